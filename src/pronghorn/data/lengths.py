"""How long rows are in tokens, which `max_seq_length` fits them, and what padding costs with and without packing."""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pronghorn.data.checks.formats import Format, format_of, problems_of
from pronghorn.data.checks.measure import Meter, measure
from pronghorn.data.checks.run import Paths, load_named
from pronghorn.data.packing import best_fit_decreasing
from pronghorn.data.reading import RowFile, level_of
from pronghorn.errors import RowsUnreadable

#: Sizes that are advised: powers of two, and half-way between.
SIZES = tuple(sorted(size for k in range(7, 21) for size in (1 << k, 3 << (k - 1))))
#: Of the tokens that count, what an advised size may cut off.
MOST_LOST = 0.005
PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99, 99.9, 100)
#: Rows that are packed to find the waste of packing; more are sampled evenly.
PACKED_ROWS = 200_000


@dataclass
class LengthReport:
    """Lengths of all rows of some files.

    Args:
        tokens: of each row that could be rendered.
        supervised: of those, how many count.
        problems: rows left out, by kind of problem.
        asked: `max_seq_length` that was asked about.
        context: the tokenizer's longest sequence, where it knows one.
        batch: rows of a padded batch.
    """

    files: list[str]
    tokens: array[int] = field(default_factory=lambda: array("Q"))
    supervised: array[int] = field(default_factory=lambda: array("Q"))
    problems: Counter[str] = field(default_factory=Counter)
    asked: int | None = None
    context: int | None = None
    batch: int = 8

    @property
    def supervised_share(self) -> float:
        return sum(self.supervised) / max(sum(self.tokens), 1)

    def percentiles(self) -> dict[str, int]:
        """The length that a given share of the rows does not exceed."""
        ordered = sorted(self.tokens)
        return {f"{p:g}": ordered[max(math.ceil(p / 100 * len(ordered)) - 1, 0)] for p in PERCENTILES}

    def at(self, size: int) -> Truncation:
        """What training with `max_seq_length=size` means."""
        return Truncation.of(self.tokens, size, self.batch)

    def advice(self) -> tuple[int, str]:
        """(the advised `max_seq_length`, why)."""
        longest = max(self.tokens)
        sizes = [size for size in SIZES if self.context is None or size <= self.context] or [SIZES[0]]
        chosen = next((size for size in sizes if self.lost_share(size) <= MOST_LOST), sizes[-1])
        whole = -(-longest // 64) * 64
        if whole <= chosen and (self.context is None or whole <= self.context):
            return whole, f"it holds every row: the longest has {longest:,} tokens"
        lost = self.lost_share(chosen)
        cut = sum(length > chosen for length in self.tokens)
        why = (
            f"it cuts {cut:,} of {len(self.tokens):,} rows and {lost:.2%} of their tokens; "
            f"holding the longest row ({longest:,} tokens) would take {whole:,}"
        )
        if lost > MOST_LOST:
            return chosen, f"the model takes no more; {why}"
        return chosen, why

    def lost_share(self, size: int) -> float:
        """Share of all tokens that truncation to `size` cuts off."""
        lost = sum(length - size for length in self.tokens if length > size)
        return lost / max(sum(self.tokens), 1)

    def as_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "files": self.files,
            "rows": len(self.tokens),
            "rows_left_out": dict(self.problems),
            "tokens": sum(self.tokens),
            "supervised_tokens": sum(self.supervised),
            "supervised_share": self.supervised_share,
        }
        if self.tokens:
            size, why = self.advice()
            chosen = self.asked or size
            facts |= {
                "percentiles": self.percentiles(),
                "advised_max_seq_length": size,
                "reason": why,
                "max_seq_length": chosen,
                **self.at(chosen).as_dict(),
            }
        return facts


@dataclass(frozen=True)
class Truncation:
    """Rows cut to one size.

    Args:
        rows_cut: longer rows.
        tokens_lost: of all their tokens.
        padding: share of the positions of padded batches (rows in the file's order) that hold no token.
        padding_packed: the same where whole rows are packed into sequences of the size.
        sequences: packed ones, in all.
    """

    size: int
    rows_cut: int
    tokens_lost: int
    padding: float
    padding_packed: float
    sequences: int

    @classmethod
    def of(cls, tokens: Sequence[int], size: int, batch: int) -> Truncation:
        cut = [min(length, size) for length in tokens if length]
        padded = sum(max(part) * len(part) for part in _parts(cut, batch))
        step = -(-len(cut) // PACKED_ROWS) or 1
        sample = cut[::step]
        sequences = len(best_fit_decreasing(sample, size)) if sample else 0
        return cls(
            size=size,
            rows_cut=sum(length > size for length in tokens),
            tokens_lost=sum(length - size for length in tokens if length > size),
            padding=1 - sum(cut) / max(padded, 1),
            padding_packed=1 - sum(sample) / max(sequences * size, 1),
            sequences=sequences * step,
        )

    def as_dict(self) -> dict[str, Any]:
        facts = dict(self.__dict__)
        del facts["size"]
        return facts


def _parts(values: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def stats(
    files: Paths,
    tokenizer: Any,
    *,
    max_seq_length: int | None = None,
    batch: int = 8,
    responses_only: bool = True,
    text_field: str = "text",
    encoding: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LengthReport:
    """Measure all rows of files with a tokenizer (or the name of one), in several processes.

    Args:
        max_seq_length: judge this one; None advises one.
        batch: rows of a batch, for what padding costs.
        responses_only: only answers count.
        workers: processes; None takes one for each core, at most 8.
        progress: is told (bytes read, bytes in all) now and then.

    Raises:
        CommandMisused: a file is not there, or of no kind that is read.
        RowsUnreadable: no row could be measured; with the reason of most of them.
    """
    paths: Sequence[Any] = [files] if isinstance(files, str | os.PathLike) else list(files)
    opened = [RowFile(path, encoding) for path in paths]
    tokenizer = load_named(tokenizer)
    meter = Meter(tokenizer, None, responses_only=responses_only, text_field=text_field)
    context = getattr(tokenizer, "model_max_length", None)
    report = LengthReport(
        [file.name for file in opened],
        asked=max_seq_length,
        batch=batch,
        context=context if isinstance(context, int) and context < 1 << 24 else None,
    )
    rows = _rows(opened, text_field, report, progress)
    for _, measured in measure(rows, meter, workers):
        if not measured.tokens:
            report.problems[measured.problems[0].kind if measured.problems else "empty-field"] += 1
            continue
        report.tokens.append(measured.tokens)
        report.supervised.append(measured.supervised)
    if not report.tokens:
        names, reasons = ", ".join(report.files), report.problems.most_common(1)
        raise RowsUnreadable(
            f"no row of {names} could be measured" + (f" ({reasons[0][0]})" if reasons else ""),
            fix="see pronghorn data check with the same tokenizer",
        )
    return report


def _rows(
    files: list[RowFile],
    text_field: str,
    report: LengthReport,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[None, Mapping[str, Any], Format | None]]:
    """Rows without errors; the others are counted."""
    total, before = sum(file.size for file in files), 0
    for file in files:
        for number, record in enumerate(file.records()):
            if progress is not None and number % 64 == 0:
                progress(before + file.position, total)
            if record.problem is not None:
                report.problems[record.problem.kind] += 1
            elif record.value is not None:
                format = format_of(record.value, text_field) if isinstance(record.value, Mapping) else None
                errors = [p for p in problems_of(record.value, format, text_field) if level_of(p) == "error"]
                if errors:
                    report.problems[errors[0].kind] += 1
                else:
                    yield None, record.value, format
        before += file.size
