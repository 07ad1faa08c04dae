"""Runs batches step by step with plain torch calls; the reference of captured steps, and what a CPU runs."""

from __future__ import annotations

from collections.abc import Sequence as Many
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from pronghorn.inference.choosing import next_tokens
from pronghorn.inference.decoder import Decoder
from pronghorn.inference.forward import Cache, Part, decode, logits_of, prefill
from pronghorn.inference.one_row import is_faster_without_onednn, without_onednn
from pronghorn.inference.projections import Segment
from pronghorn.inference.requests import Token
from pronghorn.inference.sequences import Sequence
from pronghorn.kernels.decode_attention import Paged


class StepLost(Exception):
    """Programs of a step's launch waited for each other in vain: what it and later ones gave is worth nothing."""


class Pending(Protocol):
    """Tokens of a step that may still be on its way."""

    def tokens(self) -> list[tuple[Sequence, Token]]:
        """Waits for the step.

        Raises:
            StepLost: it has no tokens; `Runner.recover` comes next.
        """


class Runner(Protocol):
    """What the engine drives."""

    #: whether the next step may be launched before the last one's tokens are read
    runs_ahead: bool
    cache: Cache

    def prefill(self, parts: Many[tuple[Sequence, int]]) -> Pending:
        """Compute the tokens of each sequence from those cached up to the given length; the next token of each that
        is complete then, in its slot."""

    def decode(self, sequences: Many[Sequence]) -> Pending:
        """One more token of each sequence."""

    def is_prepared(self, sequences: Many[Sequence]) -> bool:
        """Whether a step of these is launched at once; a first one may take seconds, for kernels to be compiled."""

    def leave(self, sequence: Sequence) -> None:
        """A sequence gives its slot away."""

    def is_sparse(self, sequences: Many[Sequence]) -> bool:
        """Whether the sequences would take a smaller step in other slots."""

    def refresh(self) -> None:
        """The decoder has been read again."""

    def recover(self) -> None:
        """A step was lost; what made it so is not done again."""


class Done:
    """A step that is over."""

    def __init__(self, chosen: list[tuple[Sequence, Token]]) -> None:
        self._chosen = chosen

    def tokens(self) -> list[tuple[Sequence, Token]]:
        return self._chosen


class EagerRunner:
    """Every step launched operation by operation and waited for."""

    runs_ahead = False

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        self.decoder, self.cache = decoder, cache
        #: whether single rows are multiplied without oneDNN, once that is known
        self._own_products: bool | None = None

    def prefill(self, parts: Many[tuple[Sequence, int]]) -> Pending:
        complete, logits = self.prefilled(parts)
        return Done([] if logits is None else list(zip(complete, next_tokens(complete, logits), strict=True)))

    def prefilled(self, parts: Many[tuple[Sequence, int]]) -> tuple[list[Sequence], Tensor | None]:
        """Those that are complete, and fp32 logits [n, V] of their next tokens; None where none is."""
        ids = [token for sequence, end in parts for token in sequence.tokens[sequence.cached : end]]
        adapter = parts[0][0].request.adapter
        pieces = [Part(s.cached, end - s.cached, s.blocks, len(s.tokens), s.state or 0) for s, end in parts]
        hidden = prefill(self.decoder, self.cache, ids, pieces, adapter)
        rows = [row for row, (sequence, end) in enumerate(parts) if end == len(sequence.tokens)]
        complete = [parts[row][0] for row in rows]
        if not rows:
            return complete, None
        hidden = hidden if len(rows) == len(parts) else hidden[rows]
        return complete, logits_of(self.decoder, hidden, [Segment(adapter, slice(0, len(rows)))])

    def decode(self, sequences: Many[Sequence]) -> Pending:
        ordered = sorted(sequences, key=lambda s: (s.request.adapter or "", s.id))
        device = self.decoder.device
        segments = segments_of(ordered)
        host = [(sequence.blocks, len(sequence.tokens)) for sequence in ordered]
        most = max(len(blocks) for blocks, _ in host)
        tables = torch.tensor(
            [[*b, *[0] * (most - len(b))] for b, _ in host], dtype=torch.int32, device=device
        )
        lengths = torch.tensor([length for _, length in host], dtype=torch.int32, device=device)
        ids = torch.tensor([sequence.tokens[-1] for sequence in ordered], device=device)
        states = None
        if self.decoder.recurrent:
            states = torch.tensor([s.state for s in ordered], dtype=torch.int32, device=device)
        with self._products(len(ordered)):
            hidden = decode(self.decoder, self.cache, ids, Paged(tables, lengths, host, states), segments)
            logits = logits_of(self.decoder, hidden, segments)
        return Done(list(zip(ordered, next_tokens(ordered, logits), strict=True)))

    def _products(self, rows: int) -> AbstractContextManager[None]:
        """What multiplies so many rows on this machine."""
        if rows != 1 or self.decoder.device.type != "cpu":
            return nullcontext()
        if self._own_products is None:
            head = self.decoder.head
            weight = (head.stack or head.weights[0]).ready(self.decoder.dtype)
            self._own_products = is_faster_without_onednn(weight)
        return without_onednn() if self._own_products else nullcontext()

    def is_prepared(self, sequences: Many[Sequence]) -> bool:
        return True

    def leave(self, sequence: Sequence) -> None:
        """Rows are made anew in every step."""

    def is_sparse(self, sequences: Many[Sequence]) -> bool:
        return False

    def refresh(self) -> None:
        """Nothing is kept between steps."""

    def recover(self) -> None:
        """No step is ever lost."""


def segments_of(ordered: Many[Sequence]) -> list[Segment]:
    """Runs of rows with the same adapter."""
    segments, start = [], 0
    for adapter, group in groupby(ordered, key=lambda s: s.request.adapter):
        count = len(list(group))
        segments.append(Segment(adapter, slice(start, start + count)))
        start += count
    return segments
