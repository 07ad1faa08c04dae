"""``pronghorn plan``: the settings that fit a GPU and are fastest, from the model's config and the rows' lengths."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pronghorn.cli.models import config_of
from pronghorn.cli.numbers import not_negative, positive, whole
from pronghorn.errors import BudgetInvalid, CommandMisused
from pronghorn.hardware import gpu_memory

if TYPE_CHECKING:
    from pronghorn.memory import Gpu
    from pronghorn.tuning.advice import Advice
    from pronghorn.tuning.planner import Job
    from pronghorn.tuning.workload import Workload

#: Tokens of a row where neither the data nor anybody says.
ROW_TOKENS = 2048
RANK = 16


def register(commands: Any) -> None:
    """Add ``plan`` to the parser's commands."""
    plan = commands.add_parser(
        "plan",
        help="the settings that fit a GPU and are fastest, with memory, time and cost",
        description="Reads the model's config and the rows' lengths; no weights are loaded and no GPU is needed.",
    )
    plan.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder with a config.json, a .gguf file, a hub id"
    )
    plan.add_argument("--model", dest="named", metavar="MODEL", help="the same by name")
    plan.add_argument(
        "--data", nargs="+", metavar="FILE", help="the rows: length, batch, rank and rate follow them"
    )
    plan.add_argument(
        "--gpu",
        action="append",
        metavar="NAME",
        help="such as 'RTX 4090', or all (repeatable; default: the one here)",
    )
    plan.add_argument(
        "--price-per-hour",
        action="append",
        default=[],
        metavar="[GPU=]PRICE",
        help="adds the cost; with several GPUs one each (repeatable)",
    )
    plan.add_argument(
        "--budget", metavar="SIZE", help="GPU memory for torch, such as 24GiB (default: the GPU's)"
    )
    plan.add_argument("--max-seq-length", type=positive, metavar="N", help="default: by the data, else 2048")
    plan.add_argument(
        "--batch", type=positive, metavar="N", help="rows of a micro-batch (default: what is fastest)"
    )
    plan.add_argument(
        "--global-batch", type=positive, metavar="N", help="rows of an optimizer step (default: advised)"
    )
    plan.add_argument(
        "--epochs", type=not_negative, metavar="N", help="passes over the data (default: advised)"
    )
    plan.add_argument(
        "--rank", type=whole, metavar="R", help="of the adapters (default: advised); 0: all weights"
    )
    stored = plan.add_mutually_exclusive_group()
    for name, value in (("16bit", "16-bit"), ("int8", "int8"), ("4bit", "4-bit")):
        stored.add_argument(f"--load-in-{name}", dest="precision", action="store_const", const=value)
    plan.add_argument("--no-offload", action="store_true", help="keep out of the host's memory")
    plan.add_argument("--compare", action="store_true", help="beside Transformers and PEFT as they come")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the plan; a job that fits nowhere is an error with the way out."""
    from pronghorn.cli.quiet import quiet_libraries

    quiet_libraries()
    from pronghorn.cli import plan_output as output
    from pronghorn.engine.planning import text_config
    from pronghorn.tuning.planner import PRECISIONS, choose, does_not_fit, settings

    name = options.named or options.model
    if name is None:
        raise CommandMisused("a model is missing", fix="pronghorn plan --model MODEL")
    config = text_config(config_of(name))
    gpus, host_limit = _gpus(options)
    prices = _prices(options.price_per_hour, [gpu for gpu, _ in gpus])
    job, advice = _job(options, name, config, host_limit)
    precisions = (options.precision,) if options.precision else PRECISIONS
    if options.precision in ("int8", "4-bit") and not job.rank:
        raise CommandMisused(
            f"{options.precision} weights cannot be trained themselves", fix="give --rank, or --load-in-16bit"
        )
    if len(gpus) > 1:
        rows = [
            output.GpuRow(gpu, settings(job, gpu, budget, precisions), prices.get(gpu.name))
            for gpu, budget in gpus
        ]
        output.show_gpus(name, job, rows, as_json=options.json)
        return 0
    gpu, budget = gpus[0]
    found = settings(job, gpu, budget, precisions)
    if not found:
        raise does_not_fit(job, gpu, budget, precisions)
    view = output.View(name, choose(found), found, budget, prices.get(gpu.name), advice, options.compare)
    output.show(view, as_json=options.json)
    return 0


def _gpus(options: argparse.Namespace) -> tuple[list[tuple[Gpu, int | None]], int | None]:
    """((GPU, bytes that torch may reserve or None for all it has) each; most pinned host memory, None for any).

    Raises:
        BudgetInvalid: a GPU that is not listed, or none here and none named.
    """
    import torch

    from pronghorn.memory import GPUS, HOST_SHARE, available_host_bytes, gpu_of, parse_budget

    if options.gpu:
        budget = parse_budget(options.budget) if options.budget else None
        found = []
        for name in options.gpu:
            one = gpu_of(name)
            if name.lower() != "all" and one is None:
                known = ", ".join(gpu.name for gpu in GPUS)
                raise BudgetInvalid(
                    f"no rates are known of a GPU '{name}'", fix=f"use all, or one of {known}"
                )
            found += [(gpu, budget) for gpu in (GPUS if one is None else (one,))]
        return found, None
    by_name = {gpu.name: gpu for gpu in GPUS}
    if not torch.cuda.is_available():
        if options.budget is None:
            raise BudgetInvalid(
                "there is no GPU here to plan for", fix="name one, such as --gpu 'RTX 4090', or --gpu all"
            )
        taken = replace(by_name["H200"], note="no GPU is named, and none is here: an H200's rates are taken")
        return [(taken, parse_budget(options.budget))], None
    name, memory = torch.cuda.get_device_name(), gpu_memory()
    unlisted = replace(by_name["4090"], name=name, note="it is not listed: a 4090's rates are taken")
    budget = parse_budget(options.budget or "auto", memory.within_reach)
    return [(gpu_of(name, memory.total) or unlisted, budget)], int(available_host_bytes() * HOST_SHARE)


def _prices(given: list[str], gpus: list[Gpu]) -> dict[str, float]:
    """Prices an hour by GPU.

    Raises:
        CommandMisused: a price that is no number, or of no planned GPU.
    """
    from pronghorn.memory import gpu_of

    prices = {}
    for text in given:
        name, _, price = text.rpartition("=")
        gpu = gpu_of(name) if name else (gpus[0] if len(gpus) == 1 else None)
        if gpu is None or gpu.name not in {one.name for one in gpus}:
            raise CommandMisused(
                f"--price-per-hour {text} does not say of which GPU", fix="give GPU=PRICE, such as H100=2.50"
            )
        try:
            prices[gpu.name] = not_negative(price)
        except (ValueError, argparse.ArgumentTypeError):
            raise CommandMisused(f"'{price}' is no price", fix="give a number, such as 0.35") from None
    return prices


def _job(
    options: argparse.Namespace, name: str, config: Any, host_limit: int | None
) -> tuple[Job, list[Advice]]:
    """The job, and the advice that what is left open in it was taken from."""
    from pronghorn.tuning.advice import Facts, advise
    from pronghorn.tuning.planner import GLOBAL_BATCH, Job
    from pronghorn.tuning.workload import Workload

    job = Job(
        config,
        Workload.full_rows(options.max_seq_length or ROW_TOKENS),
        rank=RANK if options.rank is None else options.rank,
        global_batch=_whole_batches(GLOBAL_BATCH, options),
        epochs=options.epochs or 1,
        offload=not options.no_offload,
        host_limit=host_limit,
        micro_batch=options.batch,
    )
    if not options.data:
        return job, []
    work = _workload(options, name)
    facts = Facts(
        model_type=config.model_type,
        hidden=config.hidden_size,
        rank_parameters=replace(job, rank=1).adapter_parameters,
        rows=work.rows or 0,
        tokens=work.tokens / work.documents,
        supervised=work.supervised * work.tokens / work.documents,
        adapters=options.rank != 0,
        rank=options.rank or None,
        batch=options.global_batch,
        epochs=options.epochs,
    )
    advice = advise(facts)
    values = {one.name: one.value for one in advice}
    # A packed sequence holds several rows.
    sequences = 1 << max(int(values["batch"] / work.documents).bit_length() - 1, 0)
    job = replace(
        job,
        workload=work,
        rank=values.get("r", 0),
        epochs=values["num_train_epochs"],
        global_batch=_whole_batches(sequences, options),
    )
    return job, advice


def _whole_batches(advised: int, options: argparse.Namespace) -> int:
    """Rows of an optimizer step: as asked, else what is advised, in whole micro-batches.

    Raises:
        CommandMisused: micro-batches of the size that is asked for do not make up the step that is asked for.
    """
    batch = options.batch or 1
    asked: int | None = options.global_batch
    if asked is None:
        return -(-advised // batch) * batch
    if asked % batch:
        raise CommandMisused(
            f"steps of {asked} rows are no whole number of micro-batches of {batch}",
            fix=f"--global-batch {-(-asked // batch) * batch}, or another --batch",
        )
    return asked


def _workload(options: argparse.Namespace, name: str) -> Workload:
    """The rows of the data as this model's tokenizer counts them."""
    from pronghorn.cli.data import progress_bar
    from pronghorn.cli.tokenizers import tokenizer_named
    from pronghorn.data.lengths import stats
    from pronghorn.tuning.workload import Workload

    with progress_bar("Measuring") as progress:
        report = stats(options.data, tokenizer_named(name), progress=progress)
    return Workload.of(report, options.max_seq_length)
