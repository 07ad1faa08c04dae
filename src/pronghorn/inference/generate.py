"""One answer of a loaded model to a list of chat messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pronghorn.errors import TokenizerProblem

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 takes the most likely one, so the answer is repeatable."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.95
    repetition_penalty: float = 1.0


def encode_chat(tokenizer: Any, messages: Messages, **template: Any) -> Any:
    """Token ids [1, T] and mask of the conversation, up to where the assistant speaks.

    Args:
        template: what else the chat template asks for, such as enable_thinking.

    Raises:
        TokenizerProblem: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TokenizerProblem(
            "this model's tokenizer has no chat template, so it cannot hold a conversation",
            fix="use an instruction-tuned model, or set tokenizer.chat_template",
        )
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", **template
    )


def generate(
    model: Any,
    tokenizer: Any,
    messages: Messages,
    sampling: Sampling = Sampling(),
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's answer. ``on_text`` gets each piece of it as soon as it is whole words.

    The model is put into evaluation mode for the call and back afterwards.
    """
    import torch

    from pronghorn.engine import evaluating

    inputs = encode_chat(tokenizer, messages).to(next(model.parameters()).device)
    streamer = _text_streamer(tokenizer, on_text) if on_text else None
    with evaluating(model), torch.inference_mode():
        output = model.generate(
            **inputs, **generation_arguments(tokenizer, sampling), streamer=streamer, use_cache=True
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def generation_arguments(tokenizer: Any, sampling: Sampling) -> dict[str, Any]:
    """Arguments for Transformers' `generate`; a checkpoint's own sampling defaults are overruled."""
    arguments: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "pad_token_id": tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id,
    }
    if sampling.temperature > 0:
        return {**arguments, "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    return {**arguments, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _text_streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
