"""What is trained on, as far as memory and time depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pronghorn.data.lengths import LengthReport

#: Rows are packed where they are on average shorter than this share of the longest: batches of such rows would reserve
#: memory for the longest and mostly compute on much less.
PACK_BELOW = 0.5


@dataclass(frozen=True)
class Workload:
    """Sequences that come by in one epoch; a sequence is a row, or with packing several.

    Args:
        length: tokens of the longest sequence (`max_seq_length`).
        tokens: of an average sequence.
        documents: rows in an average sequence.
        sequences: in an epoch; None where no data was given.
        supervised: share of the tokens that count in the loss.
        packing: rows are packed into sequences of `length`.
        padding: share of the positions of padded batches without a token, for a trainer that pads.
        rows, rows_cut: of the data, and those that are longer than `length`.
        reason: why this length.
    """

    length: int
    tokens: float
    documents: float = 1.0
    sequences: int | None = None
    supervised: float = 1.0
    packing: bool = False
    padding: float = 0.0
    rows: int | None = None
    rows_cut: int = 0
    reason: str = "as asked"

    @classmethod
    def full_rows(cls, length: int) -> Workload:
        """Rows that all have `length` tokens; how many is not known."""
        return cls(
            length, float(length), reason="no data was given: every row is taken to be as long as this"
        )

    @classmethod
    def of(cls, report: LengthReport, length: int | None = None) -> Workload:
        """The rows of a length report, cut to `length` or to what the report advises."""
        advised, reason = report.advice()
        chosen = length or advised
        reason = reason if length is None else f"as asked; {advised:,} is advised"
        left_out = sum(report.problems.values())
        if left_out:
            reason += f"; rows that could not be measured: {left_out:,} (pronghorn data check names them)"
        cut = report.at(chosen)
        rows = len(report.tokens)
        kept = sum(report.tokens) - cut.tokens_lost
        packing = kept / rows < PACK_BELOW * chosen and cut.sequences < rows
        sequences = cut.sequences if packing else rows
        return cls(
            length=chosen,
            tokens=kept / sequences,
            documents=rows / sequences,
            sequences=sequences,
            supervised=report.supervised_share,
            packing=packing,
            padding=cut.padding_packed if packing else cut.padding,
            rows=rows,
            rows_cut=cut.rows_cut,
            reason=reason,
        )
