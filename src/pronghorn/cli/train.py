"""``pronghorn train config.yaml``: load, adapt, train, evaluate, save, as the file says."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, get_type_hints

from pronghorn.cli.console import duration, first_line, heading, say, table
from pronghorn.cli.models import resolve_model
from pronghorn.config import RunConfig, arguments, load_config, training_arguments
from pronghorn.errors import CommandMisused, ConfigInvalid


def run(config_path: str, overrides: list[str], *, resume: bool = False, as_json: bool = False) -> int:
    """Train as ``config_path`` describes; with ``as_json`` the last line of output is one JSON object."""
    config = load_config(config_path, overrides)
    folder = Path(config.output.folder)
    checkpoint = last_checkpoint(folder) if resume else None
    # Everything that can be refused without a model is refused before one is loaded.
    settings = training_settings(config)
    from pronghorn.cli.rows import load_rows

    train_rows, held_rows = load_rows(config)
    model, tokenizer = load_model(config)
    from pronghorn import SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=settings,
        processing_class=tokenizer,
        train_dataset=train_rows,
        eval_dataset=held_rows,
    )
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    summary: dict[str, Any] = {
        "steps": result.global_step,
        "seconds": round(seconds, 2),
        "train_loss": result.training_loss,
        "eval_loss": float(trainer.evaluate()["eval_loss"]) if held_rows is not None else None,
        "train_rows": len(train_rows),
        "eval_rows": len(held_rows) if held_rows is not None else 0,
        "peak_memory_bytes": _peak_memory(),
        "resumed_from": str(checkpoint) if checkpoint else None,
        **save_results(config, trainer.model, tokenizer, folder),
    }
    _show(summary)
    if as_json:
        say(json.dumps(summary))
    return 0


def training_settings(config: RunConfig) -> Any:
    """The SFTConfig of a run.

    Raises:
        ConfigInvalid: a key under ``training`` that SFTConfig does not have.
    """
    from pronghorn import SFTConfig

    hints = get_type_hints(SFTConfig)
    fields = {item.name: hints.get(item.name, Any) for item in dataclasses.fields(SFTConfig) if item.init}
    values = training_arguments(config, fields)
    values.setdefault("output_dir", config.output.folder)
    values.setdefault("report_to", "none")
    values.setdefault("max_length", config.model.max_seq_length)
    if config.data.text_field is not None:
        values.setdefault("dataset_text_field", config.data.text_field)
    if config.data.held_back and "eval_steps" in values:
        values.setdefault("eval_strategy", "steps")
    try:
        return SFTConfig(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigInvalid(
            f"these training arguments do not go together: {first_line(error)}",
            where=config.where("training"),
            fix="change the argument it names",
        ) from error


def load_model(config: RunConfig) -> tuple[Any, Any]:
    """(model with its adapter, or all its weights to train; tokenizer)."""
    from pronghorn import FastLanguageModel

    loading = arguments(config.model)
    loading["model_name"] = resolve_model(loading["model_name"])
    model, tokenizer = FastLanguageModel.from_pretrained(**loading)
    if not config.model.full_finetuning:
        model = FastLanguageModel.get_peft_model(model, **arguments(config.adapter))
    return model, tokenizer


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in an output folder.

    Raises:
        CommandMisused: there is none.
    """
    named = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    whole = [path for path in named if (path / "trainer_state.json").is_file()]
    if not whole:
        raise CommandMisused(
            f"there is no checkpoint in '{folder}' to resume from",
            fix="start without --resume, with training.save_steps set for next time",
        )
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]))


def save_results(config: RunConfig, model: Any, tokenizer: Any, folder: Path) -> dict[str, str | None]:
    """Save what ``output`` asks for; the paths by what they hold."""
    saved: dict[str, str | None] = {"adapter": None, "model": None, "merged": None}
    if config.model.full_finetuning:
        target = folder / "model"
        model.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))
        saved["model"] = str(target)
        return saved
    if config.output.save_adapter:
        target = folder / "adapter"
        model.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))
        saved["adapter"] = str(target)
    if config.output.save_merged is not None:
        target = folder / "merged"
        model.save_pretrained_merged(str(target), tokenizer, save_method=config.output.save_merged)
        saved["merged"] = str(target)
    return saved


def _peak_memory() -> int | None:
    """Most bytes that were reserved on the GPU; None without one."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def _show(summary: dict[str, Any]) -> None:
    heading("Trained")
    rows = [("steps", f"{summary['steps']} in {duration(summary['seconds'])}")]
    rows.append(("training loss", f"{summary['train_loss']:.4f}"))
    if summary["eval_loss"] is not None:
        rows.append(("held-back loss", f"{summary['eval_loss']:.4f} ({summary['eval_rows']} rows)"))
    if summary["peak_memory_bytes"]:
        rows.append(("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"))
    rows += [(kind, summary[kind]) for kind in ("adapter", "model", "merged") if summary[kind]]
    table("Run", ("what", "value"), rows)
