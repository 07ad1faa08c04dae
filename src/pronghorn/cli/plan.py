"""``pronghorn plan``: what a training step will take, from the model's config alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pronghorn.cli.console import first_line, say, table
from pronghorn.cli.models import resolve_model
from pronghorn.errors import BudgetInvalid, CommandMisused, ModelNotFound

if TYPE_CHECKING:
    from pronghorn.memory import Batch, ModelShape, Plan, Rates

GIB = 2**30


def run(options: argparse.Namespace) -> int:
    """Print the plan; a budget that cannot hold the step is an error with the way out."""
    from pronghorn.cli.quiet import quiet_libraries

    quiet_libraries()
    from pronghorn.memory import Batch, plan

    shape = _shape(options)
    rates, budget, host = _machine(options)
    tokens = options.batch * options.max_seq_length
    batch = Batch(tokens, tokens - options.batch, options.batch)
    found = plan(shape, budget, batch, rates=rates, host_limit=host, offload=not options.no_offload)
    if options.json:
        say(json.dumps(_as_dict(found, shape, rates), indent=2))
    else:
        _print(found, shape, rates, options)
    return 0


def _shape(options: argparse.Namespace) -> ModelShape:
    from pronghorn.engine.planning import shape_of_config

    config = _config(options.model)
    quantised = getattr(config, "quantization_config", None) or {}
    quantised = quantised if isinstance(quantised, dict) else quantised.to_dict()
    four_bit = options.load_in_4bit or bool(quantised.get("load_in_4bit"))
    int8 = options.load_in_int8 and not four_bit
    storage = "nf4 double" if four_bit else "bfloat16"
    if int8:
        if not options.rank:
            raise CommandMisused(
                "int8 weights cannot be trained", fix="give --rank, or leave out --load-in-int8"
            )
        storage = "int8" if options.int8_copies == 1 else "int8 two"
    return shape_of_config(
        config,
        rank=options.rank,
        storage=storage,
        trained="adapters" if options.rank else "all",
        joined=int8,
    )


def _config(name: str) -> Any:
    """The Transformers config of a folder, a GGUF file or a hub repository, of which nothing else is read."""
    from pronghorn.loading.model import load_config
    from pronghorn.loading.source import base_of_adapter, locate

    source = locate(resolve_model(name))
    if source.kind == "adapter":
        source = base_of_adapter(source)
    if source.is_local:
        return load_config(source, trust_remote_code=False)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.location, revision=source.revision)
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"'{name}' is no local folder and the hub did not give its config: {first_line(error)}",
            fix="check the name; without a network give a folder with a config.json",
        ) from error


def _machine(options: argparse.Namespace) -> tuple[Rates, int, int | None]:
    """(rates, budget, most pinned host memory): of the GPU here, or of one that is named."""
    import torch

    from pronghorn.memory import HOST_SHARE, RATES, available_host_bytes, parse_budget, rates_of

    here = torch.cuda.is_available()
    if options.gpu is not None and not any(rates.name.lower() in options.gpu.lower() for rates in RATES):
        known = ", ".join(rates.name for rates in RATES)
        raise BudgetInvalid(f"no rates are known of a GPU '{options.gpu}'", fix=f"use one of {known}")
    if options.gpu is not None:
        rates = next(
            r for r in sorted(RATES, key=lambda r: -len(r.name)) if r.name.lower() in options.gpu.lower()
        )
    else:
        rates = rates_of(torch.cuda.get_device_name() if here else "H200")
    budget = options.budget or ("auto" if here else None)
    if budget is None:
        raise BudgetInvalid(
            "there is no GPU here to plan for", fix="name a memory size, such as --budget 24GiB"
        )
    free = torch.cuda.mem_get_info()[0] if here else None
    return rates, parse_budget(budget, free), int(available_host_bytes() * HOST_SHARE) if here else None


def _print(found: Plan, shape: ModelShape, rates: Rates, options: argparse.Namespace) -> None:
    e, time, batch = found.estimate, found.time, found.batch
    weights = f"{shape.parameters / 1e9:.2f} billion weights as {shape.storage}"
    trained = f"adapters of rank {options.rank}" if options.rank else "all weights trained"
    say(
        f"{options.model}: {weights}, {trained}; {batch.documents} x {batch.tokens // batch.documents} tokens a step"
    )
    table(
        "Memory",
        ("part", "GiB", "what it is"),
        [
            ("weights", _gib(e.weights), shape.storage),
            (
                "training state",
                _gib(e.fixed - e.weights),
                "adapters, gradients, optimizer, library workspaces",
            ),
            *((f"most in {name}", _gib(size), "with the above") for name, size in e.moments.items()),
            ("reserved", _gib(e.reserved), f"by torch; the budget is {_gib(found.budget)}"),
            ("host", _gib(e.host), "pinned"),
        ],
    )
    table(
        "Alternatives",
        ("save levels", "reserved GiB", "host GiB", "ms a step", "rebuilt"),
        _rows(found, shape, rates),
    )
    say()
    for reason in (f"save levels, from the first layer to the last: {found.counts()}", *found.reasons):
        say(f"- {reason}")
    say(f"- about {batch.tokens / time.total:,.0f} tokens a second on one {rates.name}, by its rates alone")


def _rows(found: Plan, shape: ModelShape, rates: Rates) -> list[tuple[str, str, str, str, str]]:
    """The plan, and every level for all layers."""
    from pronghorn.blocks import LEVELS
    from pronghorn.memory import estimate
    from pronghorn.memory.cost import step_time

    rows = [_row("the plan", found.estimate, found.time, True)]
    for level in LEVELS:
        e = estimate(shape, level, found.batch, capability=rates.capability)
        time = step_time(shape, (level,) * shape.layers, found.batch, rates)
        rows.append(_row(level, e, time, e.reserved <= found.budget))
    return rows


def _row(name: str, e: Any, time: Any, fits: bool) -> tuple[str, str, str, str, str]:
    reserved = _gib(e.reserved) + ("" if fits else " (too much)")
    return name, reserved, _gib(e.host), f"{time.total * 1e3:.0f}", f"{time.recompute_share:.0%}"


def _as_dict(found: Plan, shape: ModelShape, rates: Rates) -> dict[str, Any]:
    batch: Batch = found.batch
    return {
        "levels": list(found.levels),
        "tile_rows": found.tile_rows,
        "budget_bytes": found.budget,
        "tokens": batch.tokens,
        "documents": batch.documents,
        "estimate": asdict(found.estimate),
        "seconds": asdict(found.time),
        "recompute_share": found.time.recompute_share,
        "gpu": rates.name,
        "parameters": shape.parameters,
        "storage": shape.storage,
        "reasons": list(found.reasons),
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
