"""What a request may ask for."""

from __future__ import annotations

from collections.abc import Sequence

from pronghorn.errors import AdapterUnknown, RequestTooLong, SamplingInvalid, nearest
from pronghorn.inference.requests import Request, SamplingParams


def check_request(
    request: Request, vocabulary: int, max_context: int, adapters: Sequence[str], only: str | None
) -> None:
    """Refuse a request that the engine cannot answer.

    Args:
        only: the one adapter that every request has to name; None where they may name any or none.

    Raises:
        SamplingInvalid: a prompt without tokens, with tokens beyond the vocabulary, or a value outside of its range.
        RequestTooLong: prompt and answer exceed `max_context` tokens.
        AdapterUnknown: there is no adapter of that name.
    """
    _check_prompt(request.prompt_ids, vocabulary)
    check_sampling(request.sampling)
    asked, new = len(request.prompt_ids), request.sampling.max_new_tokens
    if asked + new > max_context:
        room = max_context - asked
        raise RequestTooLong(
            f"a prompt of {asked:,} tokens and an answer of {new:,} exceed the context of {max_context:,} tokens",
            fix=f"at most {room:,} new tokens, or a shorter prompt" if room > 0 else "a shorter prompt",
        )
    if request.adapter is not None and request.adapter not in adapters:
        known = ", ".join(adapters) or "none is loaded"
        raise AdapterUnknown(
            f"there is no adapter named '{request.adapter}'",
            fix=nearest(request.adapter, adapters) or f"one of: {known}",
        )
    if only is not None and request.adapter != only:
        raise AdapterUnknown(
            f"adapter '{only}' brings modules of its own, so the base model cannot be asked without it",
            fix=f"name adapter '{only}' in every request",
        )


def _check_prompt(prompt: Sequence[int], vocabulary: int) -> None:
    if not prompt:
        raise SamplingInvalid(
            "the prompt has no tokens", fix="give at least one, such as the model's first token"
        )
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        outside = next(token for token in prompt if not 0 <= token < vocabulary)
        raise SamplingInvalid(
            f"the prompt holds token {outside}, and the vocabulary has {vocabulary:,}",
            fix="encode the prompt with this model's tokenizer",
        )


def check_sampling(sampling: SamplingParams) -> None:
    """Refuse values outside of their range.

    Raises:
        SamplingInvalid: names the value and its range.
    """
    ranges = {
        "max_new_tokens": (sampling.max_new_tokens >= 1, "at least 1"),
        "temperature": (0.0 <= sampling.temperature < float("inf"), "0 (the most likely token) or more"),
        "top_p": (0.0 < sampling.top_p <= 1.0, "a number above 0 and up to 1"),
        "top_k": (sampling.top_k >= 0, "0 (all) or more"),
        "min_p": (0.0 <= sampling.min_p <= 1.0, "a number from 0 to 1"),
        "repetition_penalty": (0.0 < sampling.repetition_penalty < float("inf"), "a number above 0"),
        "logprobs": (sampling.logprobs is None or sampling.logprobs >= 0, "None, or 0 or more"),
    }
    for name, (allowed, allowed_range) in ranges.items():
        if not allowed:
            raise SamplingInvalid(f"{name} is {getattr(sampling, name)}", fix=allowed_range)
