"""Answers to many prompts at once: rows padded on the left, so that all end where the assistant speaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pronghorn.inference.generate import Messages, Sampling, encode_chat, generation_arguments


def generate_batch(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Messages],
    sampling: Sampling | None = None,
    *,
    beginning: str = "",
    batch_size: int = 8,
    seed: int = 0,
) -> list[tuple[str, bool]]:
    """(answer as it was written, whether it ended by itself) for each conversation, in their order.

    Conversations of like length share a batch. Random numbers come from `seed` and leave the global state as it was;
    the same conversations, seed and batch size give the same answers. The model is put into evaluation mode for the
    call and back afterwards.

    Args:
        beginning: text that every answer begins with; the model goes on from there. It is part of the answers.

    Raises:
        TokenizerProblem: the tokenizer has no chat template.
    """
    import torch

    from pronghorn.engine import evaluating

    sampling = sampling or Sampling()
    given = torch.tensor(tokenizer(beginning, add_special_tokens=False)["input_ids"], dtype=torch.long)
    encoded = [
        torch.cat((encode_chat(tokenizer, messages)["input_ids"][0], given)) for messages in conversations
    ]
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    device = next(model.parameters()).device
    answers: list[tuple[str, bool]] = [("", False)] * len(encoded)
    devices = [device] if device.type == "cuda" else []
    with evaluating(model), torch.inference_mode(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, answer in zip(
                chosen, _answer(model, tokenizer, [encoded[i] for i in chosen], sampling), strict=True
            ):
                answers[index] = (beginning + answer[0], answer[1])
    return answers


def _answer(model: Any, tokenizer: Any, rows: list[Any], sampling: Sampling) -> list[tuple[str, bool]]:
    import torch

    arguments = generation_arguments(tokenizer, sampling)
    ends = stop_tokens(model, tokenizer)
    width = max(len(row) for row in rows)
    device = next(model.parameters()).device
    ids = torch.full((len(rows), width), arguments["pad_token_id"], dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        **arguments,
        eos_token_id=ends or None,
        use_cache=True,
    )
    answers = []
    for row in output[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        answers.append((text, end is not None))
    return answers


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the model's generation config, and the tokenizer's EOS."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    tokens = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*tokens, tokenizer.eos_token_id] if token is not None})
