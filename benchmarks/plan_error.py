"""How far predictions are from runs: every measured row of benchmarks/results that a plan could have been made for.

    python -m benchmarks.plan_error                        # prints the table
    python -m benchmarks.plan_error --write docs/planning.md

Nothing is run. A row's model, batch, save levels, storage and attention are taken from the CSV file; memory (reserved
by torch) and time are predicted as `pronghorn plan` does it. Time is compared for captured steps only: eager ones are
bound by the host's Python, which nothing here predicts but for the stock libraries.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.models import model_config
from benchmarks.registry import find_side, find_workload
from pronghorn.blocks import Level
from pronghorn.engine.planning import plan_with_expanded, shape_of_config
from pronghorn.memory import Batch, Estimate, ModelShape, estimate, gpu_of, parse_budget
from pronghorn.tuning.roofline import micro_batch_seconds, optimizer_seconds
from pronghorn.tuning.stock import stock_bytes, stock_seconds

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
#: How the CSV's description of a model's weights is called as a storage.
STORAGE = {
    "bfloat16": "bfloat16",
    "nf4 double": "nf4 double",
    "bfloat16, fp8 two": "fp8 two",
    "int8 two": "int8 two",
    "nf4 double, nf4 double in int8 products": "nf4 double in int8 products",
}
START, END = "<!-- plan_error: begin -->", "<!-- plan_error: end -->"


@dataclass(frozen=True)
class Row:
    """A measured run beside its prediction; seconds are None where they are not predicted."""

    file: str
    gpu: str
    workload: str
    side: str
    reserved: float
    predicted: float
    seconds: float | None
    predicted_seconds: float | None

    @property
    def memory_error(self) -> float:
        return self.predicted / self.reserved - 1

    @property
    def time_error(self) -> float | None:
        if self.seconds is None or self.predicted_seconds is None:
            return None
        return self.predicted_seconds / self.seconds - 1


def rows(folder: Path = RESULTS) -> Iterator[Row]:
    """Every run on a listed GPU whose rows all have one length; of the stock library and of ours."""
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                # Other benchmarks leave files of other columns beside them.
                if line.get("ms_median") and not line["error"] and gpu_of(line["hardware"]) is not None:
                    found = _row(path.name, line)
                    if found is not None:
                        yield found


def _row(file: str, line: dict[str, str]) -> Row | None:
    workload, side = find_workload(line["workload"]), find_side(line["side"])
    if workload.mixed or side.batch or (line["side"] != "hf" and side.library != "pronghorn"):
        return None
    gpu = gpu_of(line["hardware"])
    assert gpu is not None
    tokens = workload.rows * workload.length
    batch = Batch(tokens, tokens, workload.rows)
    measured, milliseconds = float(line["whole_reserved_gib"]), float(line["ms_median"])
    if side.library == "hf":
        shape = _shape(line["workload"], "nf4 double" if workload.four_bit else "bfloat16", "flash")
        size, seconds = stock_bytes(shape, batch, gpu.rates), stock_seconds(shape, batch, gpu.rates)
    else:
        text = line["kernels"]
        described = re.search(r"weights: ([^\n;]*)", text)
        storage = STORAGE.get(described[1].strip()) if described else None
        attention = re.search(r"attention: (\w+)", text)
        if storage is None or attention is None:
            return None
        shape = _shape(line["workload"], storage, {"sdpa": "flash"}.get(attention[1], attention[1]))
        captured = line.get("steps_run", "").startswith("captured")
        # These runs were made before a graph's pool was asked for in one piece.
        unit = "gated units" in text
        shape = replace(shape, captured=captured, in_one_piece=False, unit_in_products=unit)
        found, computed = _ours(shape, line["side"], _levels(text), batch)
        size = found.reserved
        seconds = micro_batch_seconds(computed, _levels(text), batch, gpu.rates) + optimizer_seconds(
            shape, gpu.rates
        )
        if not captured:
            milliseconds, seconds = 0.0, 0.0
    return Row(
        file.removesuffix(".csv"), gpu.name, line["workload"], line["side"], measured, size / GIB,
        milliseconds / 1e3 or None, seconds or None,
    )  # fmt: skip


def _shape(workload: str, storage: str, attention: str) -> ModelShape:
    known = find_workload(workload)
    return shape_of_config(
        model_config(known.model), rank=known.rank, storage=storage, attention=attention,
        joined=storage.startswith("int8"),
    )  # fmt: skip


def _ours(
    shape: ModelShape, side: str, levels: tuple[Level, ...], batch: Batch
) -> tuple[Estimate, ModelShape]:
    """The estimate, and the shape whose products are computed: what 4-bit weights become, where that is kept."""
    budget = re.search(r"([\d.]+GiB)", side)
    if budget is not None:
        gpu = gpu_of("H200")
        assert gpu is not None
        size = parse_budget(budget[1])
        kept = plan_with_expanded(shape, size, batch, gpu.rates, size)
        if kept is not None and kept.levels == levels and set(levels) == {"all"}:
            return kept.estimate, replace(shape, storage=shape.multiplied)
    return estimate(shape, levels, batch), shape


def _levels(text: str) -> tuple[Level, ...]:
    """Of "save levels: 14x offload, 18x matmuls": each layer's."""
    found = re.search(r"save levels: ([^\n;]*)", text)
    assert found is not None, "a run of ours tells its save levels"
    parts = (part.strip().split("x ", 1) for part in found[1].split(","))
    return tuple(level for count, level in parts for _ in range(int(count)))  # type: ignore[misc]


def table(found: list[Row]) -> str:
    """Markdown: each run, and a summary by library."""
    lines = [
        "| run | workload | reserved GiB | predicted | | ms a step | predicted | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        times = ("", "", "")
        if row.seconds is not None and row.predicted_seconds is not None and row.time_error is not None:
            times = (
                f"{row.seconds * 1e3:.0f}",
                f"{row.predicted_seconds * 1e3:.0f}",
                f"{row.time_error:+.1%}",
            )
        lines.append(
            f"| {row.side} | {row.workload} | {row.reserved:.2f} | {row.predicted:.2f} | {row.memory_error:+.1%} | "
            f"{' | '.join(times)} |"
        )
    summary = ["| | runs | memory: median, worst | time: median, worst |", "|---|---|---|---|"]
    for name, ours in (("pronghorn", True), ("Transformers + PEFT", False)):
        part = [row for row in found if row.side.startswith("pronghorn") is ours]
        memory = [row.memory_error for row in part]
        time = [row.time_error for row in part if row.time_error is not None]
        summary.append(f"| {name} | {len(part)} | {_spread(memory)} | {_spread(time)} |")
    return "\n".join([*summary, "", *lines])


def _spread(errors: list[float]) -> str:
    if not errors:
        return "-"
    return f"{statistics.median(map(abs, errors)):.1%}, {max(errors, key=abs):+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_error", description=__doc__)
    parser.add_argument(
        "--write",
        metavar="PAGE.md",
        help="put the table between the two comments of the page, and of zh/PAGE.md",
    )
    options = parser.parse_args()
    found = table(list(rows()))
    if options.write is None:
        print(found)
        return
    page = Path(options.write)
    for version in (page, page.parent / "zh" / page.name):
        before, _, rest = version.read_text(encoding="utf-8").partition(START)
        after = rest.partition(END)[2]
        temporary = version.with_suffix(".tmp")
        temporary.write_text(f"{before}{START}\n{found}\n{END}{after}", encoding="utf-8")
        temporary.replace(version)


if __name__ == "__main__":
    main()
