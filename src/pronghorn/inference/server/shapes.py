"""Answers as OpenAI's JSON objects: whole, and as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pronghorn.inference.server.answers import Piece
from pronghorn.inference.server.text import TokenNames

LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def as_dict(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Shape:
    """Makes the objects of one call.

    Args:
        model: the name that the call used.
        logprobs: None, or how many alternatives each token has.
    """

    model: str
    names: TokenNames
    logprobs: int | None
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def whole(self, answers: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head(self.whole_object), "choices": choices, "usage": usage.as_dict()}

    def chunk(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        return {**self._head(self.chunk_object), "choices": [self._delta(index, piece, first)]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head(self.chunk_object), "choices": [], "usage": usage.as_dict()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _choice(self, index: int, answer: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        raise NotImplementedError


class ChatShape(Shape):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _choice(self, index: int, answer: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, **self._end(answer)}

    def _delta(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant"} if first else {}
        return {"index": index, "delta": {**delta, "content": piece.text}, **self._end(piece)}

    def _end(self, piece: Piece) -> dict[str, Any]:
        told = None
        if self.logprobs is not None:
            told = {
                "content": [
                    {
                        **self._named(token.id, token.logprob),
                        "top_logprobs": [self._named(*p) for p in token.top],
                    }
                    for token, _ in piece.tokens
                ],
                "refusal": None,
            }
        return {"logprobs": told, "finish_reason": piece.finish}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self.names.text(token),
            "logprob": _finite(logprob),
            "bytes": self.names.bytes(token),
        }


class CompletionShape(Shape):
    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def _choice(self, index: int, answer: Piece) -> dict[str, Any]:
        told = None
        if self.logprobs is not None:
            told = {
                "tokens": [self.names.text(token.id) for token, _ in answer.tokens],
                "token_logprobs": [_finite(token.logprob) for token, _ in answer.tokens],
                "top_logprobs": [
                    {self.names.text(t): _finite(p) for t, p in token.top} for token, _ in answer.tokens
                ]
                if self.logprobs
                else None,
                "text_offset": [at for _, at in answer.tokens],
            }
        return {"index": index, "text": answer.text, "logprobs": told, "finish_reason": answer.finish}

    def _delta(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        return self._choice(index, piece)


def _finite(logprob: float | None) -> float | None:
    """As OpenAI writes the impossible: JSON has no infinity."""
    return logprob if logprob is None or logprob > LEAST_LOGPROB else LEAST_LOGPROB
