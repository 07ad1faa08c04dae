"""What ``pronghorn plan`` prints: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pronghorn.blocks import LEVELS
from pronghorn.blocks.levels import ROOMY_TILES
from pronghorn.cli.console import duration, say, table
from pronghorn.memory import Gpu, estimate
from pronghorn.memory.cost import step_time
from pronghorn.memory.gpus import GIB
from pronghorn.tuning.advice import Advice
from pronghorn.tuning.planner import Job, Setting, budget_of, choose, measured_int8
from pronghorn.tuning.stock import StockSetting, stock_settings


@dataclass(frozen=True)
class View:
    """A plan for one GPU: what is taken, what else would fit, and what it is shown with."""

    model: str
    chosen: Setting
    found: Sequence[Setting]
    budget: int | None
    price: float | None
    advice: Sequence[Advice]
    compare: bool

    @property
    def limit(self) -> int:
        """Bytes that torch may reserve."""
        return self.budget or budget_of(self.chosen.gpu)

    @property
    def stock(self) -> list[StockSetting]:
        """The job in Transformers and PEFT, where that is asked for and adapters are trained."""
        job, gpu = self.chosen.job, self.chosen.gpu
        return stock_settings(job, gpu, self.limit) if self.compare and job.rank else []


@dataclass(frozen=True)
class GpuRow:
    """What fits one GPU of several."""

    gpu: Gpu
    found: Sequence[Setting]
    price: float | None


def show(view: View, *, as_json: bool) -> None:
    """The plan for one GPU."""
    if as_json:
        say(json.dumps(_as_dict(view), indent=2))
        return
    _headline(view)
    table("Settings", ("setting", "value", "why"), _settings(view))
    table(
        "Memory at the peak",
        ("part", "GiB", "what it is"),
        [
            *((part.name, _gib(part.size), part.about) for part in view.chosen.parts),
            ("in all", _gib(view.chosen.peak), f"of {view.chosen.gpu.memory:g} GiB"),
            ("host", _gib(view.chosen.plan.estimate.host), "pinned"),
        ],
    )
    table("Time", ("what", "value"), _times(view.chosen, view.price))
    _alternatives(view)
    _levels(view)
    if view.advice:
        _advice(view.advice)
    say()
    for reason in view.chosen.plan.reasons:
        say(f"- {reason}")
    if not view.advice:
        say("- with --data there is a total time, and advice on rate, rank, batch and epochs")


def _headline(view: View) -> None:
    chosen, shape = view.chosen, view.chosen.shape
    trained = f"adapters of rank {chosen.job.rank}" if chosen.job.rank else "all weights trained"
    gpu = chosen.gpu
    say(
        f"{view.model}: {shape.parameters / 1e9:.2f} billion weights as {shape.storage}, {trained}; on one {gpu.name}"
    )
    if gpu.note:
        say(f"{gpu.name}: {gpu.note}")


def _settings(view: View) -> list[tuple[str, str, str]]:
    chosen, job, work = view.chosen, view.chosen.job, view.chosen.job.workload
    rows = [("weights", chosen.precision, chosen.label), ("max_length", f"{work.length:,}", work.reason)]
    if work.rows is not None:
        why = (
            f"{work.documents:.1f} rows a sequence"
            if work.packing
            else "the rows fill the length well enough"
        )
        rows.append(("packing", str(work.packing), why))
    rows += [
        ("r", str(job.rank), "rank of the adapters" if job.rank else "no adapters"),
        (
            "per_device_train_batch_size",
            str(chosen.micro_batch),
            "the fastest that fits" if job.micro_batch is None else "as asked",
        ),
        ("gradient_accumulation_steps", str(chosen.accumulation), f"{job.global_batch} rows a step"),
        (
            "save levels",
            chosen.plan.counts(),
            "from the first layer to the last; the trainer plans them itself",
        ),
    ]
    return rows


def _times(chosen: Setting, price: float | None) -> list[tuple[str, str]]:
    rows = [
        ("optimizer step", f"{chosen.seconds * 1e3:,.0f} ms, {chosen.tokens:,.0f} tokens"),
        ("tokens a second", f"{chosen.tokens_per_second:,.0f}"),
    ]
    if chosen.job.steps is not None and chosen.total_seconds is not None:
        rows.append(("steps", f"{chosen.job.steps:,} ({chosen.job.epochs:g} epochs)"))
        rows.append(("in all", duration(chosen.total_seconds)))
        if price is not None:
            rows.append(("cost", f"{price * chosen.total_seconds / 3600:,.2f} at {price:g} an hour"))
    else:
        rows.append(("a million tokens", duration(1e6 / chosen.tokens_per_second)))
        if price is not None:
            rows.append(("cost", f"{price / 3.6e-3 / chosen.tokens_per_second:,.2f} a million tokens"))
    rates = (
        "measured rates" if chosen.gpu.shares.reason.startswith("measured") else "rates from its data sheet"
    )
    rows.append(("by", f"{rates} ({chosen.gpu.source}; shares: {chosen.gpu.shares.reason})"))
    return rows


def _alternatives(view: View) -> None:
    rows = []
    for setting in view.found:
        mark = "the plan" if setting is view.chosen else setting.label
        if setting.precision == "int8" and not measured_int8(setting.gpu):
            mark += "; not measured on this GPU"
        rows.append(("pronghorn, " + setting.precision, *_alternative(setting, view.price), mark))
    for stock in view.stock:
        rows.append(
            (f"Transformers + PEFT, {stock.precision}", *_alternative(stock, view.price), stock.label)
        )
    if len(rows) > 1:
        table("Alternatives", ("method", *_heads(view.chosen.job), ""), rows)


def _alternative(setting: Setting | StockSetting, price: float | None) -> tuple[str, ...]:
    seconds = setting.total_seconds or 1e6 / setting.tokens_per_second
    return (
        f"{setting.accumulation} x {setting.micro_batch}",
        _gib(setting.peak),
        f"{setting.tokens_per_second:,.0f}",
        duration(seconds),
        "-" if price is None else f"{price * seconds / 3600:,.2f}",
    )


def _heads(job: Job) -> tuple[str, ...]:
    """Heads of the columns of `_alternative`."""
    return "steps x rows", "peak GiB", "tokens/s", "in all" if job.steps else "1M tokens", "cost"


def _levels(view: View) -> None:
    """The plan's micro-batch at every save level for all layers."""
    plan, shape, rates = view.chosen.plan, view.chosen.shape, view.chosen.gpu.rates
    rows = [_level("the plan", plan.estimate, plan.time, True)]
    for level in LEVELS:
        e = estimate(shape, level, plan.batch, capability=rates.capability)
        time = step_time(shape, (level,) * shape.layers, plan.batch, rates)
        rows.append(_level(level, e, time, e.reserved <= view.limit))
    table(
        f"Save levels, {plan.batch.documents} x {plan.batch.tokens // plan.batch.documents} tokens",
        ("levels", "reserved GiB", "host GiB", "ms", "rebuilt"),
        rows,
    )


def _level(name: str, e: Any, time: Any, fits: bool) -> tuple[str, str, str, str, str]:
    reserved = _gib(e.reserved) + ("" if fits else " (too much)")
    return name, reserved, _gib(e.host), f"{time.total * 1e3:.0f}", f"{time.recompute_share:.0%}"


def _advice(advice: Sequence[Advice]) -> None:
    table("Advice", ("setting", "value", "rule"), [(one.name, one.value, one.rule) for one in advice])
    say()
    for one in advice:
        if one.fails:
            say(f"- {one.name}: {one.source}. Fails: {one.fails}.")


def show_gpus(model: str, job: Job, rows: Sequence[GpuRow], *, as_json: bool) -> None:
    """A table over GPUs."""
    if as_json:
        say(json.dumps([_gpu_dict(row) for row in rows], indent=2))
        return
    work = job.workload
    say(f"{model}, rank {job.rank}, rows of at most {work.length:,} tokens, {job.global_batch} a step")
    heads = ("GPU", "GiB", "GB/s", "TFLOP/s 16-bit, fp8, int8", "weights", *_heads(job))
    cells = []
    for row in rows:
        gpu = row.gpu
        rates = ", ".join(
            f"{rate:,.0f}" if rate else "-" for rate in (gpu.bf16 or gpu.fp16, gpu.fp8, gpu.int8)
        )
        facts = (gpu.name, f"{gpu.memory:g}", f"{gpu.bandwidth:,}", rates)
        if not row.found:
            cells.append((*facts, "does not fit", *[""] * 5))
            continue
        chosen = choose(row.found)
        cells.append((*facts, chosen.precision, *_alternative(chosen, row.price)))
    table("GPUs", heads, cells)
    table(
        "Where the figures are from",
        ("GPU", "data sheet", "share of it that a step gets"),
        [(row.gpu.name, row.gpu.source, row.gpu.shares.reason) for row in rows],
    )


def _gpu_dict(row: GpuRow) -> dict[str, Any]:
    facts = asdict(row.gpu)
    chosen = choose(row.found) if row.found else None
    return {**facts, "plan": None if chosen is None else _setting_dict(chosen, row.price)}


def _setting_dict(setting: Setting | StockSetting, price: float | None) -> dict[str, Any]:
    total = setting.total_seconds
    return {
        "precision": setting.precision,
        "label": setting.label,
        "micro_batch": setting.micro_batch,
        "accumulation": setting.accumulation,
        "peak_bytes": setting.peak,
        "step_seconds": setting.seconds,
        "tokens_per_second": setting.tokens_per_second,
        "total_seconds": total,
        "cost": None if total is None or price is None else price * total / 3600,
    }


def _as_dict(view: View) -> dict[str, Any]:
    chosen, plan, work = view.chosen, view.chosen.plan, view.chosen.job.workload
    return {
        "model": view.model,
        "gpu": chosen.gpu.name,
        "parameters": chosen.shape.parameters,
        "storage": chosen.shape.storage,
        "rank": chosen.job.rank,
        "max_length": work.length,
        "packing": work.packing,
        "global_batch": chosen.job.global_batch,
        "steps": chosen.job.steps,
        **_setting_dict(chosen, view.price),
        "levels": list(plan.levels),
        "tile_rows": None if plan.tile_rows == ROOMY_TILES else plan.tile_rows,
        "budget_bytes": view.limit,
        "tokens": plan.batch.tokens,
        "documents": plan.batch.documents,
        "estimate": asdict(plan.estimate),
        "parts": {part.name: part.size for part in chosen.parts},
        "seconds": asdict(plan.time),
        "recompute_share": plan.time.recompute_share,
        "reasons": list(plan.reasons),
        "alternatives": [_setting_dict(setting, view.price) for setting in view.found],
        "stock": [_setting_dict(setting, view.price) for setting in view.stock],
        "advice": [asdict(one) for one in view.advice],
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
