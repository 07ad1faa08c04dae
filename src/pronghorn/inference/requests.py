"""What the engine is asked for and what it answers: plain values that a server or a trainer can hold and compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen.

    Args:
        max_new_tokens: at most so many.
        temperature: 0 takes the most likely token.
        top_p: the smallest set of most likely tokens with at least this much probability; 1.0 keeps all.
        top_k: the k most likely tokens; 0 keeps all.
        min_p: tokens at least this share of the most likely one's probability; 0.0 keeps all.
        repetition_penalty: logits of tokens seen in prompt or answer are divided by it (multiplied where negative).
        seed: of this request's random numbers; None draws one from torch's generator.
        stop_token_ids: tokens that end the answer; the one that did is part of it.
        logprobs: None gives none; n gives that of each token and the n most likely ones. They are of the model's own
            distribution: temperature, penalty and cuts come after.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Request:
    """A prompt to be continued, by the base model or through one of its adapters."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    adapter: str | None = None


@dataclass(frozen=True)
class Token:
    """A token of an answer; `top` are (token, log-probability) pairs, the most likely first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """New tokens of a request, in order; a `finish_reason` comes with its last event."""

    request_id: int
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None
