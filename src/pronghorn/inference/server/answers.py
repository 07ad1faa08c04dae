"""An answer while it is written: the engine's tokens in, text and log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pronghorn.inference.requests import Event, Token
from pronghorn.inference.server.problems import CallProblem
from pronghorn.inference.server.text import StopStrings, TextDecoder

Finish = Literal["stop", "length"]


@dataclass
class Piece:
    """What an answer has gained.

    Args:
        tokens: (token, where its text begins in the answer), of those whose text is told now.
        finish: with the last piece.
    """

    text: str = ""
    tokens: list[tuple[Token, int]] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, other: Piece) -> None:
        self.text += other.text
        self.tokens += other.tokens
        self.finish = self.finish or other.finish


class Answer:
    """Follows one request of the engine.

    Args:
        stops: strings; the answer ends before the first of them.
        stop_tokens: one of these at the end is no text.
        before: the prompt's tokens where the answer goes on from its text; none in a chat.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str], stop_tokens: Sequence[int], before: Sequence[int] = ()
    ) -> None:
        self._decoder = TextDecoder(tokenizer, before)
        self._stops = StopStrings(stops)
        self._stop_tokens = frozenset(stop_tokens)
        self._untold: list[tuple[Token, int]] = []
        self._decoded = 0
        self._told = 0
        self._ended = False
        self.token_count = 0

    def feed(self, event: Event) -> Piece:
        """The piece that an event adds. With a `finish` it is the last: the request may still be running then, and what
        else comes of it adds nothing.

        Raises:
            CallProblem: 503 when the engine gave the request up.
        """
        piece = Piece()
        if self._ended:
            return piece
        if event.finish_reason == "cancelled":
            raise CallProblem(503, "the answer was cancelled", code="cancelled")
        for token in event.tokens:
            self.token_count += 1
            if token.id in self._stop_tokens:
                continue
            self._untold.append((token, self._decoded))
            piece.text += self._heard(self._decoder.feed(token.id))
            if self._stops.found:
                break
        if event.finish_reason is not None and not self._stops.found:
            piece.text += self._heard(self._decoder.finish()) + self._stops.finish()
            piece.finish = event.finish_reason
        if self._stops.found:
            piece.finish = "stop"
        self._ended = piece.finish is not None
        self._tell(piece)
        return piece

    def _heard(self, text: str) -> str:
        self._decoded += len(text)
        return self._stops.feed(text)

    def _tell(self, piece: Piece) -> None:
        """Move tokens into the piece whose text has begun; at an end without a stop string, all that are left."""
        self._told += len(piece.text)
        everything = piece.finish is not None and not self._stops.found
        count = next(
            (i for i, (_, at) in enumerate(self._untold) if at >= self._told and not everything),
            len(self._untold),
        )
        piece.tokens, self._untold = self._untold[:count], self._untold[count:]
