"""What scripts ask of vLLM: `SamplingParams`, `model.fast_generate` and `model.load_lora`, answered by this library.

vLLM itself is not used. A call is one of `model.generate`, on pronghorn's engine where that knows the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pronghorn.compat.lora_requests import LoRARequest, answering_with
from pronghorn.engine import base_causal_lm
from pronghorn.errors import DropInUnavailable, TokenizerProblem, UnknownArgument
from pronghorn.inference.model_generate import answering
from pronghorn.loading.arguments import note_without_effect, refuse_unknown

logger = logging.getLogger("pronghorn")

#: arguments of `fast_generate` that have nothing to switch here
_WITHOUT_EFFECT = frozenset({"priority", "tokenization_kwargs", "use_tqdm"})


@dataclass
class SamplingParams:
    """How answers are chosen, with vLLM's names and defaults.

    Args:
        n: answers to each prompt.
        temperature: 0 takes the most likely token.
        top_k: the k most likely tokens; 0 and -1 keep all.
        max_tokens: of an answer; None: as many as the model has room for.
        stop: texts that end an answer, of which they are no part unless `include_stop_str_in_output`.
        ignore_eos: go on where the model would end.

    Raises:
        UnknownArgument: a value of an argument that changes what is drawn and is not followed here.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    guided_decoding: Any = None
    structured_outputs: Any = None
    logit_bias: Any = None
    bad_words: Any = None

    def __post_init__(self) -> None:
        for name in (
            "presence_penalty", "frequency_penalty", "logprobs", "prompt_logprobs", "guided_decoding",
            "structured_outputs", "logit_bias", "bad_words",
        ):  # fmt: skip
            if getattr(self, name):
                raise UnknownArgument(
                    f"SamplingParams({name}=...) is not followed here, as vLLM has no part in it",
                    fix="leave it out, or write a logits_processor for model.generate",
                )


@dataclass
class CompletionOutput:
    """One answer."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    cumulative_logprob: float | None = None
    logprobs: Any = None
    stop_reason: Any = None


@dataclass
class RequestOutput:
    """A prompt with its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


def fast_generate(
    model: Any,
    prompts: Any = None,
    sampling_params: Any = None,
    *,
    lora_request: LoRARequest | None = None,
    **given: Any,
) -> Any:
    """Answers to prompts of text, each with `.outputs[0].text`, as vLLM gives them; tensors go to `model.generate`.

    Args:
        prompts: a text or several, or dictionaries with `prompt` and perhaps `multi_modal_data={"image": ...}`, or
            with `prompt_token_ids`.
        sampling_params: a `SamplingParams` for all prompts, or one for each.
        lora_request: from `model.load_lora`; None answers without any adapter, as vLLM does.
    """
    if "input_ids" in given or isinstance(prompts, Tensor) or _is_encoding(prompts):
        if sampling_params is not None or lora_request is not None:
            raise UnknownArgument(
                "sampling_params and lora_request go with prompts of text, not with tensors",
                fix="give the texts, or call model.generate(**inputs, max_new_tokens=...)",
            )
        return model.generate(prompts, **given)
    refuse_unknown(given, fast_generate, _WITHOUT_EFFECT)
    note_without_effect(given, "fast_generate")
    asked = [prompts] if isinstance(prompts, str | Mapping) or _is_ids(prompts) else list(prompts)
    if not isinstance(sampling_params, list | tuple):
        sampling_params = [sampling_params or SamplingParams()] * len(asked)
    if len(sampling_params) != len(asked):
        raise UnknownArgument(
            f"{len(asked)} prompts have {len(sampling_params)} sampling_params", fix="one each"
        )
    outputs: list[Any] = [None] * len(asked)
    with answering(model), answering_with(model, lora_request):
        for sampling, places in _alike(sampling_params, asked):
            answered = _answer(model, [asked[place] for place in places], sampling)
            for place, output in zip(places, answered, strict=True):
                outputs[place] = output
                output.request_id = str(place)
    return outputs


def load_lora(model: Any, save_directory: Any, load_tensors: bool = False, **_: Any) -> LoRARequest:
    """A saved adapter by its folder, for `fast_generate(lora_request=...)`.

    Raises:
        DropInUnavailable: there is no adapter in the folder.
    """
    folder = Path(save_directory)
    if not (folder / "adapter_config.json").is_file():
        raise DropInUnavailable(
            f"there is no adapter in '{save_directory}'",
            fix="model.save_lora(folder) writes one that load_lora reads",
        )
    return LoRARequest(folder.name, 1, str(folder))


def _is_encoding(prompts: Any) -> bool:
    return isinstance(prompts, Mapping) and "input_ids" in prompts


def _is_ids(prompts: Any) -> bool:
    return isinstance(prompts, list | tuple) and bool(prompts) and isinstance(prompts[0], int)


def _alike(sampling_params: Sequence[Any], asked: Sequence[Any]) -> Iterator[tuple[Any, list[int]]]:
    """Places of prompts that may be answered together: those of the same sampling; one with images stands alone."""
    groups: list[tuple[Any, list[int]]] = []
    for place, (sampling, prompt) in enumerate(zip(sampling_params, asked, strict=True)):
        alone = isinstance(prompt, Mapping) and prompt.get("multi_modal_data")
        found = None if alone else next((places for known, places in groups if known is sampling), None)
        if found is None:
            groups.append((object() if alone else sampling, [place]))
        else:
            found.append(place)
    for _, places in groups:
        yield sampling_params[places[0]], places


def _answer(model: Any, asked: Sequence[Any], sampling: Any) -> list[RequestOutput]:
    """Prompts that share their sampling, in one batch."""
    processor = base_causal_lm(model).__dict__.get("script_tokenizer")
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None:
        raise TokenizerProblem(
            "the model came without a tokenizer, which fast_generate reads prompts with",
            fix="load both by FastLanguageModel.from_pretrained",
        )
    encoded, prompts = _encoded(processor, tokenizer, asked)
    encoded = {
        name: value.to(base_causal_lm(model).device) if isinstance(value, Tensor) else value
        for name, value in encoded.items()
    }
    width = encoded["input_ids"].shape[1]
    ends, texts = _ends(model, tokenizer, sampling)
    room = int(getattr(model, "max_seq_length", None) or 0) - width
    limit = sampling.max_tokens if sampling.max_tokens is not None else max(room, 1)
    samples = sampling.temperature > 0
    chosen: dict[str, Any] = {"do_sample": samples, "repetition_penalty": sampling.repetition_penalty}
    if samples:
        chosen |= {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": max(sampling.top_k, 0),
        }
        chosen |= {"min_p": sampling.min_p} if sampling.min_p else {}
    if sampling.min_tokens:
        chosen["min_new_tokens"] = sampling.min_tokens
    if texts:
        chosen |= {"stop_strings": texts, "tokenizer": tokenizer}
    count = max(1, sampling.n)
    repeated = {
        name: _times(value, count, len(prompts)) if isinstance(value, Tensor) else value
        for name, value in encoded.items()
    }
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(enabled=sampling.seed is not None):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        out = model.generate(
            **repeated,
            max_new_tokens=limit,
            eos_token_id=ends or None,
            pad_token_id=pad,
            use_cache=True,
            **chosen,
        )
    rows = out[:, width:].tolist()
    results = []
    for number, prompt in enumerate(prompts):
        mask = encoded["attention_mask"][number].bool()
        output = RequestOutput(str(number), prompt, encoded["input_ids"][number][mask].tolist())
        for index, row in enumerate(rows[number * count : (number + 1) * count]):
            output.outputs.append(_completion(index, row, tokenizer, sampling, ends, texts))
        results.append(output)
    return results


def _times(value: Tensor, count: int, prompts: int) -> Tensor:
    """Each prompt's part so many times over. A prompt with images stands alone, and these may be rows of patches, in
    any number, which stay in order."""
    return torch.cat([value] * count) if prompts == 1 else value.repeat_interleave(count, 0)


def _encoded(processor: Any, tokenizer: Any, asked: Sequence[Any]) -> tuple[dict[str, Any], list[str | None]]:
    """Rows padded on the left: input_ids [B, L], attention_mask [B, L], and what a processor makes of images."""
    prompts: list[str | None] = []
    rows: list[list[int]] = []
    for prompt in asked:
        parts = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        images = (parts.get("multi_modal_data") or {}).get("image")
        if images is not None:
            images = list(images) if isinstance(images, list | tuple) else [images]
            made = processor(
                images=images, text=[parts["prompt"]], return_tensors="pt", add_special_tokens=False
            )
            return dict(made), [parts["prompt"]]
        text = parts.get("prompt")
        if isinstance(text, str):
            # A rendered chat has its BOS already.
            begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
            rows.append(list(tokenizer(text, add_special_tokens=not begun)["input_ids"]))
            prompts.append(text)
        else:
            rows.append(list(parts["prompt_token_ids"] if text is None else text))
            prompts.append(None)
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id or 0
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}, prompts


def _ends(model: Any, tokenizer: Any, sampling: Any) -> tuple[list[int], list[str]]:
    """Tokens that end an answer, and texts that do and are not one token."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = (
        []
        if sampling.ignore_eos
        else [*(own if isinstance(own, list | tuple) else [own]), tokenizer.eos_token_id]
    )
    ends += list(sampling.stop_token_ids or ())
    texts = []
    for text in [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or ():
        token = tokenizer.get_added_vocab().get(text)
        if token is None:
            texts.append(text)
        else:
            ends.append(token)
    return list(dict.fromkeys(int(token) for token in ends if token is not None)), texts


def _completion(
    index: int, row: list[int], tokenizer: Any, sampling: Any, ends: Sequence[int], texts: Sequence[str]
) -> CompletionOutput:
    """An answer without what pads it."""
    end = next((place for place, token in enumerate(row) if token in ends), None)
    ids = row if end is None else row[: end + 1]
    text = tokenizer.decode(ids, skip_special_tokens=sampling.skip_special_tokens)
    place, found = min(((text.find(stop), stop) for stop in texts if stop in text), default=(0, None))
    if found is not None:
        text = text[: place + (len(found) if sampling.include_stop_str_in_output else 0)]
    reason = "length" if end is None and found is None else "stop"
    return CompletionOutput(index, text, ids, reason, stop_reason=found)
