"""Result rows as a table with ratios, and as CSV. A ratio is printed only where parity allows the claim."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import parity
from benchmarks.models import CONFIGS
from benchmarks.registry import BASELINE, LEVELS, Side, Workload, find_side, find_workload

COLUMNS = (
    "side",
    "tok/s",
    "ratio",
    "of ceiling",
    "label",
    "parity",
    "ms/step",
    "p10..p90",
    "alloc GiB",
    "reserved",
    "1st step s",
    "loss 1",
    "mean",
    "steps",
    "attention",
)

CSV_FIELDS = (
    "date", "commit", "source", "hardware", "workload", "side", "label", "parity", "tokens_per_s",
    "supervised_per_s", "ratio", "baseline", "of_ceiling", "ms_per_step", "ms_median", "ms_p10", "ms_p90", "steps",
    "tokens_per_step", "peak_allocated_gib", "peak_reserved_gib", "whole_allocated_gib", "whole_reserved_gib",
    "loaded_s", "first_step_s", "first_loss", "mean_loss", "steps_run", "attention", "kernels", "versions", "error",
)  # fmt: skip

#: A side whose first loss differs from the others' by more computes something else. Same weights, same rows, B = 0:
#: bf16 rounding of a mean over thousands of tokens stays far below this.
LOSS_TOLERANCE = 0.02
#: FP8 products round more: the gates hold the whole curve, this only tells another computation from a rounded one.
FP8_LOSS_TOLERANCE = 0.05
#: A side with other batches sees other documents first: about 2,000 tokens whose losses have a spread of about 1.3.
PACKED_LOSS_TOLERANCE = 0.15

#: what of `benchmarks.gates` has to be green; a run without training does not do
FP8_GATES = ("gradient cosine", "KL(", "held-out loss, paired difference", "product")

SAME, DIFFERENT, UNKNOWN = "same loss", "DIFFERENT LOSS", "unknown"


def baseline_of(results: list[dict[str, Any]]) -> str:
    """The side that ratios are against: Unsloth's default; without a GPU, where it does not run, the faster of stock
    Transformers with and without checkpointing."""
    ran = [r for r in results if "error" not in r and not r.get("ceiling")]
    if any(r["side"] == BASELINE for r in ran) or not all(r["hardware"].startswith("CPU") for r in ran):
        return BASELINE
    stock = [r for r in ran if r["side"] in ("hf", "hf-nockpt")]
    return max(stock, key=lambda r: r["tokens_per_s"])["side"] if stock else BASELINE


def baseline_speed(results: list[dict[str, Any]]) -> float | None:
    """Tokens/s of the baseline side, median of its rounds; None when it did not run."""
    side = baseline_of(results)
    speeds = sorted(r["tokens_per_s"] for r in results if r["side"] == side and "error" not in r)
    return speeds[len(speeds) // 2] if speeds else None


def reference_loss(results: Iterable[dict[str, Any]]) -> float | None:
    """The first loss that the others are held to: stock Transformers', else the first side's that ran."""
    ran = [r for r in results if "error" not in r and r.get("first_loss") is not None]
    stock = [r for r in ran if r["side"].startswith("hf")]
    return (stock or ran)[0]["first_loss"] if ran else None


def loss_state(result: dict[str, Any], reference: float | None) -> str:
    """ "same loss", "DIFFERENT LOSS", or "unknown", for one row."""
    if "error" in result or reference is None or result.get("first_loss") is None:
        return UNKNOWN
    side, workload = find_side(result["side"]), find_workload(result["workload"])
    other_batches = side.batch is not None or (side.packing and workload.mixed)
    allowed = (
        PACKED_LOSS_TOLERANCE if other_batches else FP8_LOSS_TOLERANCE if side.eight_bit else LOSS_TOLERANCE
    )
    return SAME if abs(result["first_loss"] - reference) <= allowed else DIFFERENT


def parity_of(result: dict[str, Any], reference: float | None, path: Path) -> str:
    """What may be claimed: the first loss, and for pronghorn the parity check's state."""
    found = loss_state(result, reference)
    side = find_side(result["side"])
    if found == DIFFERENT or side.library != "pronghorn" or "error" in result:
        return found
    state = checked_state(side, find_workload(result["workload"]), result["hardware"], path)
    return found if state == parity.GREEN and found != SAME else f"parity {state}"


def checked_state(side: Side, workload: Workload, hardware: str, path: Path) -> str:
    """The parity check's state for a side: of its model's family, its weights' precision and its save levels."""
    if side.eight_bit:
        wanted = tuple((gate,) for gate in FP8_GATES)
        return parity.state("fp8", hardware, path, prefix=f"{side.gates(workload)}: ", wanted=wanted)
    family = CONFIGS[workload.model]["model_type"]
    precision = "nf4" if workload.four_bit else "fp32" if workload.dtype == "float32" else "bf16"
    levels = [side.checkpointing] if isinstance(side.checkpointing, str) else list(LEVELS)
    if "memory_budget" in side.train:
        levels = list(LEVELS)
    wanted = tuple((f" {family} ", f" {precision} {level} ") for level in levels)
    return parity.state("exact", hardware, path, wanted=wanted)


def rate(results: list[dict[str, Any]], path: Path = parity.DEFAULT_FILE) -> None:
    """Add `ratio`, `parity` and the share of the ceiling to the rows of one workload. No ratio where the loss differs
    or the parity check was red or not run for the present sources."""
    base, speed, reference = baseline_of(results), baseline_speed(results), reference_loss(results)
    ceilings = {r["label"]: r["tokens_per_s"] for r in results if r.get("ceiling")}
    for result in results:
        result["baseline"] = base if speed else ""
        if result.get("ceiling"):
            result |= {"parity": "", "ratio": result["tokens_per_s"] / speed if speed else None}
            continue
        result["parity"] = parity_of(result, reference, path)
        claimed = "error" not in result and result["parity"] in (SAME, UNKNOWN, f"parity {parity.GREEN}")
        result["ratio"] = result["tokens_per_s"] / speed if claimed and speed else None
        ceiling = ceilings.get(result.get("ceiling_label", result.get("label")))
        result["of_ceiling"] = result["tokens_per_s"] / ceiling if ceiling and "error" not in result else None


def cells(result: dict[str, Any]) -> list[str]:
    """One table row."""
    if "error" in result:
        return [result["side"], "failed", *[""] * (len(COLUMNS) - 2)]
    ratio = "" if result["ratio"] is None else f"{result['ratio']:.2f}x"
    refused = result["parity"] == DIFFERENT or _unchecked(result)
    spread = f"{result['ms_p10']:.0f}..{result['ms_p90']:.0f}" if "ms_p10" in result else ""
    return [
        result["side"],
        _number(result["tokens_per_s"], ",.0f"),
        "-" if refused else ratio,
        _number(result.get("of_ceiling"), ".0%"),
        result["label"],
        result["parity"],
        _number(result.get("ms_per_step"), ".1f"),
        spread,
        _number(result.get("peak_allocated_gib"), ".1f"),
        _number(result.get("peak_reserved_gib"), ".1f"),
        _number(result.get("first_step_s"), ".1f"),
        _number(result.get("first_loss"), ".3f"),
        _number(result.get("mean_loss"), ".3f"),
        result.get("steps_run", "").split(":")[0],
        result.get("attention", ""),
    ]


def _unchecked(result: dict[str, Any]) -> bool:
    """Whether a speed is refused since the parity check was red or not run."""
    return result["parity"].startswith("parity") and not result["parity"].endswith(parity.GREEN)


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


def title(workload: Workload, results: list[dict[str, Any]]) -> str:
    """What the workload is, in a line."""
    hardware = next((r["hardware"] for r in results if "hardware" in r), "unknown hardware")
    base = next((r["baseline"] for r in results if r.get("baseline")), "")
    against = f"; ratios are to {base}" if base else f"; no ratios: {BASELINE} did not run"
    cap = f", at most {workload.cap_gib:g} GiB" if workload.cap_gib else ""
    return f"{workload.name}: {workload.model}, {workload.shape} tokens, {workload.label}, {hardware}{cap}{against}"


def notes(results: list[dict[str, Any]]) -> list[str]:
    """What the table has no room for: failures, differing losses, supervised tokens, what ran."""
    lines = [f"{r['side']}: {r['error']}" for r in results if "error" in r]
    for r in results:
        if r.get("parity") == DIFFERENT:
            lines.append(f"{r['side']}: its first loss differs from the stock model's; no speed is claimed")
        elif "error" not in r and _unchecked(r):
            lines.append(
                f"{r['side']}: {r['parity']} for these sources on this hardware: no speed is claimed"
            )
        if r.get("steps_run", "").startswith("eager:"):
            lines.append(f"{r['side']}: {r['steps_run']}")
    mixed = [r for r in results if "error" not in r and find_workload(r["workload"]).mixed]
    if mixed:
        shares = (f"{r['side']} {r['supervised_per_s']:,.0f}" for r in mixed if "supervised_per_s" in r)
        lines.append(f"supervised tokens/s: {', '.join(shares)}")
    return lines


def report(workload: Workload, results: list[dict[str, Any]]) -> str:
    """The table of one workload with its title and its notes."""
    table = plain_table(COLUMNS, [cells(result) for result in results])
    return "\n".join([title(workload, results), table, *notes(results)])


def whole_report(groups: list[tuple[Workload, list[dict[str, Any]]]]) -> str:
    """Everything as one table: a line with each workload's title, then its sides."""
    rows: list[list[str]] = []
    titles: dict[int, str] = {}
    for workload, results in groups:
        titles[len(rows)] = title(workload, results)
        rows += [cells(result) for result in results]
    header, rule, *lines = plain_table(COLUMNS, rows).splitlines()
    text = [header, rule]
    for number, line in enumerate(lines):
        text += ([titles[number]] if number in titles else []) + [f"{line}"]
    return "\n".join(text + [note for _, results in groups for note in notes(results)])


def append_csv(path: Path, results: list[dict[str, Any]]) -> None:
    """Append rows; the header is written to a new file."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    elif path.read_text().partition("\n")[0] != ",".join(CSV_FIELDS):
        raise SystemExit(f"{path} has other columns: write to a new file")
    for result in results:
        versions = " ".join(f"{name}={version}" for name, version in result.get("versions", {}).items())
        writer.writerow({**result, "versions": versions})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(buffer.getvalue())
