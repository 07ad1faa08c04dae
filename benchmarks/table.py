"""Result rows as a table with ratios, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.registry import BASELINE, SIDES, WORKLOADS

COLUMNS = (
    "side",
    "tok/s",
    "vs unsloth",
    "ms/step",
    "alloc GiB",
    "reserved GiB",
    "first step s",
    "loss 1",
    "loss mean",
)

CSV_FIELDS = (
    "date", "commit", "hardware", "workload", "side", "label", "parity", "tokens_per_s", "ratio", "ms_per_step",
    "ms_median", "ms_p10", "ms_p90", "steps", "tokens_per_step", "peak_allocated_gib", "peak_reserved_gib",
    "whole_allocated_gib", "whole_reserved_gib", "loaded_s", "first_step_s", "first_loss", "mean_loss", "kernels",
    "versions", "error",
)  # fmt: skip

#: A side whose first loss differs from the others' by more computes something else. Same weights, same rows, B = 0:
#: bf16 rounding of a mean over thousands of tokens stays far below this.
LOSS_TOLERANCE = 0.02
#: A packing side's first batch holds other documents: about 2,000 tokens whose losses have a spread of about 1.3.
PACKED_LOSS_TOLERANCE = 0.15


def baseline_speed(results: Iterable[dict[str, Any]]) -> float | None:
    """Tokens/s of the baseline side, median of its rounds; None when it did not run."""
    speeds = sorted(r["tokens_per_s"] for r in results if r["side"] == BASELINE and "error" not in r)
    return speeds[len(speeds) // 2] if speeds else None


def reference_loss(results: Iterable[dict[str, Any]]) -> float | None:
    """The first loss that the others are held to: stock Transformers', else the first side's that ran."""
    ran = [r for r in results if "error" not in r and r.get("first_loss") is not None]
    stock = [r for r in ran if r["side"].startswith("hf")]
    return (stock or ran)[0]["first_loss"] if ran else None


def parity(result: dict[str, Any], reference: float | None) -> str:
    """ "same loss", "DIFFERENT LOSS", or "unknown", for one row."""
    if "error" in result or reference is None or result.get("first_loss") is None:
        return "unknown"
    packed = SIDES[result["side"]].packing and WORKLOADS[result["workload"]].mixed
    allowed = PACKED_LOSS_TOLERANCE if packed else LOSS_TOLERANCE
    return "same loss" if abs(result["first_loss"] - reference) <= allowed else "DIFFERENT LOSS"


def rate(results: list[dict[str, Any]]) -> None:
    """Add `ratio` and `parity` to the rows of one workload; no ratio where the loss differs."""
    speed, reference = baseline_speed(results), reference_loss(results)
    for result in results:
        result["parity"] = parity(result, reference)
        comparable = "error" not in result and speed and result["parity"] != "DIFFERENT LOSS"
        result["ratio"] = result["tokens_per_s"] / speed if comparable and speed else None


def cells(result: dict[str, Any]) -> list[str]:
    """One table row."""
    if "error" in result:
        return [result["side"], "failed", "", "", "", "", "", "", ""]
    ratio = "no claim" if result["parity"] == "DIFFERENT LOSS" else _number(result["ratio"], ".2f", "x")
    return [
        result["side"],
        _number(result["tokens_per_s"], ",.0f"),
        ratio,
        _number(result["ms_per_step"], ".1f"),
        _number(result["peak_allocated_gib"], ".1f"),
        _number(result["peak_reserved_gib"], ".1f"),
        _number(result["first_step_s"], ".1f"),
        _number(result["first_loss"], ".3f"),
        _number(result["mean_loss"], ".3f"),
    ]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def plain_table(header: Iterable[str], rows: Iterable[list[str]]) -> str:
    """A table in plain text: the first column left, the others right."""
    lines = [list(header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for line in lines:
        first = line[0].ljust(widths[0])
        text.append(
            "  ".join(
                [first, *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
            ).rstrip()
        )
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def report(workload: Any, results: list[dict[str, Any]]) -> str:
    """The table of one workload with its title, and one line for each failed side."""
    hardware = next((r["hardware"] for r in results if "hardware" in r), "unknown hardware")
    lengths = (
        f"{workload.rows} rows of up to {workload.length}"
        if workload.mixed
        else f"{workload.rows}x{workload.length}"
    )
    title = f"{workload.name}: {workload.model}, {lengths} tokens, {workload.label}, {hardware}"
    lines = [title, plain_table(COLUMNS, [cells(result) for result in results])]
    lines += [f"{r['side']}: {r['error']}" for r in results if "error" in r]
    lines += [
        f"{r['side']}: its first loss differs from the stock model's"
        for r in results
        if r["parity"].startswith("DIFF")
    ]
    return "\n".join(lines)


def append_csv(path: Path, results: list[dict[str, Any]]) -> None:
    """Append rows; the header is written to a new file."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    for result in results:
        versions = " ".join(f"{name}={version}" for name, version in result.get("versions", {}).items())
        writer.writerow({**result, "versions": versions})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(buffer.getvalue())
