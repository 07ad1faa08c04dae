"""``pronghorn search CONFIG.yaml --vary …``: the settings with the best held-out score, on a base loaded once."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pronghorn.cli.arguments import add_run_file
from pronghorn.cli.console import duration, first_line, say, table
from pronghorn.cli.numbers import positive
from pronghorn.errors import ConfigInvalid, SearchFailed, SearchInvalid

if TYPE_CHECKING:
    from pronghorn.config import RunConfig
    from pronghorn.experiments.search import Metric, SearchResult, Settings, Space, Task, Trial

#: Where a run's section and key of a setting is, and how the table calls it.
_SHOWN = {
    "learning_rate": "rate",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accum.",
    "r": "r",
    "lora_alpha": "alpha",
}


def register(commands: Any) -> None:
    """Add ``search`` to the parser's commands."""
    command = commands.add_parser(
        "search",
        help="try learning rates, batches and ranks; the best settings and adapter are kept",
        description="CONFIG.yaml is that of train; its rows that are held back are the score. The base model is loaded "
        "once. What is finished stays in OUTPUT/search; the same command goes on after it.",
    )
    add_run_file(command)
    command.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="learning_rate, per_device_train_batch_size, gradient_accumulation_steps, r or lora_alpha, as values "
        "(r=8,16,32) or a range (learning_rate=1e-5..1e-2) (repeatable)",
    )
    command.add_argument("--sampler", default="grid", metavar="NAME", help="grid (default), random, tpe")
    command.add_argument(
        "--trials", type=positive, metavar="N", help="at most (default: all of a grid, else 20)"
    )
    command.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="of a trial at the file's batch; all trials see as many rows",
    )
    command.add_argument(
        "--metric", metavar="MODULE:FUNCTION", help="your score: f(model, tokenizer, held_out_rows) -> number"
    )
    command.add_argument("--maximize", action="store_true", help="a higher metric is better")
    command.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="processes; those of one GPU have one base (default 1)",
    )
    command.add_argument("--restart", action="store_true", help="forget the trials that are there")
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Search, print all trials, write best.yaml.

    Raises:
        SearchFailed: no trial finished.
    """
    from pronghorn.cli.folders import output_folder
    from pronghorn.cli.quiet import quiet_libraries
    from pronghorn.cli.row_files import refuse_no_held_back
    from pronghorn.config import load_config

    config = load_config(options.config, options.overrides)
    if config.model.full_finetuning:
        raise ConfigInvalid(
            "a search puts one adapter after the other on a base that stays as it is",
            where=config.where("model.full_finetuning"),
            fix="remove model.full_finetuning",
        )
    refuse_no_held_back(config)
    quiet_libraries()
    from pronghorn.experiments.search import Space, search

    space = Space.parse(options.vary)
    metric = _metric(options.metric) if options.metric else None
    task, rows = _task(config, options.steps, metric, options.maximize)
    folder = output_folder(config.output.folder, "output.folder") / "search"
    with rows.naming_lines():
        result = search(
            task,
            space,
            folder,
            sampler=options.sampler,
            trials=options.trials,
            workers=options.workers,
            restart=options.restart,
            on_trial=None if options.json else _tell,
        )
    best = None if result.best is None else _write_best(config, result, folder / "best.yaml")
    if options.json:
        say(json.dumps({**result.as_dict(), "config": None if best is None else str(best)}))
    else:
        _show(result, space, best)
    if best is None:
        reason = next((trial.reason for trial in result.trials if trial.reason), "there is none")
        raise SearchFailed(
            f"none of {len(result.trials)} trials finished: {reason}",
            fix="search lower rates and smaller micro-batches, or see what each ran into in the table",
        )
    return 0


def _task(config: RunConfig, steps: int | None, metric: Metric | None, maximize: bool) -> tuple[Task, Any]:
    from pronghorn.cli.rows import load_rows
    from pronghorn.cli.train import adapter_arguments, load_base, training_settings
    from pronghorn.experiments.search import Task

    if steps is not None:
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, max_steps=steps))
    settings = training_settings(config)
    rows = load_rows(config)
    if "assistant_only_loss" not in config.training.other:
        settings.assistant_only_loss = config.data.responses_only and rows.are_chats
    task = Task(
        load=partial(load_base, config),
        rows=rows.train,
        held_out=rows.held_back,
        settings=settings,
        adapter=adapter_arguments(config),
        metric=metric,
        maximize=maximize,
    )
    return task, rows


def _metric(name: str) -> Metric:
    """The function that the user names, from a module beside them or an installed one."""
    module, colon, function = name.partition(":")
    if not module or not colon or not function:
        raise SearchInvalid(f"--metric {name} names no function", fix="--metric MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise SearchInvalid(
            f"the module of --metric {name} cannot be imported: {error}",
            fix="run the command in the module's folder",
        ) from None
    except Exception as error:  # of the user's own code, which runs as it is imported
        raise SearchInvalid(
            f"the module of --metric {name} cannot be imported: {type(error).__name__}: {first_line(error)}",
            fix="see that `python -c 'import " + module + "'` ends without an error",
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise SearchInvalid(f"'{module}' has no function '{function}'", fix="check the name")
    return found  # type: ignore[no-any-return]


def _tell(trial: Trial) -> None:
    settings = ", ".join(f"{_SHOWN[key]} {_value(value)}" for key, value in trial.settings.items())
    outcome = trial.reason if trial.status != "done" else f"score {trial.score:.4f}, loss {trial.loss:.4f}"
    say(f"  {trial.number:3d}  {settings}: {'' if trial.status == 'done' else trial.status + ', '}{outcome}")


def _show(result: SearchResult, space: Space, best: Path | None) -> None:
    front = result.pareto
    table(
        f"{len(result.trials)} trials; held-out loss before training {result.before:.4f}",
        (
            "trial",
            *(_SHOWN[key] for key in space.axes),
            "score",
            "loss",
            "time",
            "memory",
            "tokens/s",
            "",
            "",
        ),
        [_row(trial, space, result.best, trial.number in front) for trial in result.ranked],
    )
    say("Pareto: no other trial is better in one of score, time and memory and as good in the others.")
    if best is not None:
        table(
            "Best",
            ("what", "value"),
            [("settings", f"pronghorn train {best}"), ("adapter", str(result.adapter))],
        )


def _row(trial: Trial, space: Space, best: Trial | None, on_front: bool) -> tuple[str, ...]:
    return (
        str(trial.number),
        *(_value(trial.settings[key]) for key in space.axes),
        "" if trial.score is None else f"{trial.score:.4f}",
        "" if trial.loss is None else f"{trial.loss:.4f}",
        duration(trial.seconds),
        "" if trial.memory is None else f"{trial.memory / 2**30:.2f} GiB",
        "" if trial.tokens_per_second is None else f"{trial.tokens_per_second:,.0f}",
        "Pareto" if on_front else "",
        "best" if trial is best else "" if trial.status == "done" else f"{trial.status}: {trial.reason}",
    )


def _value(value: float) -> str:
    return f"{value:g}"


def _write_best(config: RunConfig, result: SearchResult, path: Path) -> Path:
    """The run with the best settings, as a file for ``pronghorn train``."""
    import yaml

    best = result.best
    assert best is not None and best.score is not None
    text = yaml.safe_dump(
        _sections(with_settings(config, best.settings)), sort_keys=False, allow_unicode=True
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(
        f"# The best of {len(result.trials)} trials by held-out score: {best.score:.4f} (trial {best.number}).\n{text}",
        encoding="utf-8",
    )
    return temporary.replace(path)


def with_settings(config: RunConfig, settings: Settings) -> RunConfig:
    """A run with a trial's settings. Its steps change with its batch, so that it sees as many rows as before."""
    from pronghorn.experiments.search import ADAPTER_KEYS

    adapter = {key: value for key, value in settings.items() if key in ADAPTER_KEYS}
    training = {key: value for key, value in settings.items() if key not in ADAPTER_KEYS}
    if (config.training.max_steps or 0) > 0:
        from pronghorn.cli.train import training_settings
        from pronghorn.experiments.search import steps_of

        training["max_steps"] = steps_of(training_settings(config), settings)
    return dataclasses.replace(
        config,
        adapter=dataclasses.replace(config.adapter, **adapter),
        training=dataclasses.replace(config.training, **training),
    )


def _sections(config: RunConfig) -> dict[str, Any]:
    """What the file has to say: the values that are not defaults."""
    sections = {}
    for name in ("model", "adapter", "data", "training", "output"):
        section = getattr(config, name)
        values = {
            item.name: getattr(section, item.name)
            for item in dataclasses.fields(section)
            if item.name != "other" and getattr(section, item.name) != item.default
        }
        values |= getattr(section, "other", {})
        if values:
            sections[name] = values
    return sections
