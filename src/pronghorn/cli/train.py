"""``pronghorn train config.yaml``: load, adapt, train, evaluate, save, as the file says."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pronghorn.cli.console import duration, first_line, heading, say, table
from pronghorn.cli.folders import output_folder
from pronghorn.cli.models import resolve_model
from pronghorn.cli.quiet import quiet_libraries
from pronghorn.config import RunConfig, arguments, load_config, section_arguments
from pronghorn.errors import ConfigInvalid, ExportDiffers, NonFiniteLoss, UnknownArgument, nearest
from pronghorn.importing import left_out_of_collections

if TYPE_CHECKING:
    from pronghorn.cli.rows import Rows


def run(config_path: str, overrides: list[str], *, resume: bool = False, as_json: bool = False) -> int:
    """Train as ``config_path`` describes; with ``as_json`` the last line of output is one JSON object."""
    config = load_config(config_path, overrides)
    quiet_libraries()
    # Everything that can be refused without a model is refused before one is loaded.
    settings = training_settings(config)
    output_folder(settings.output_dir, "output.folder")
    checkpoint = _newest_checkpoint(settings.output_dir) if resume else None
    trainer, rows = make_trainer(config, settings)
    from pronghorn.cli.interrupt import stopping_after_step
    from pronghorn.training.checkpoints import step_of

    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    started = time.perf_counter()
    with stopping_after_step(trainer) as stop, left_out_of_collections():
        result = _train(trainer, checkpoint)
    if stop.asked and result.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(
            f"stopped after step {result.global_step} of {trainer.state.max_steps}, which is saved in "
            f"{settings.output_dir}; the same command with --resume goes on"
        )
    seconds = time.perf_counter() - started
    trained = result.global_step > (0 if checkpoint is None else step_of(checkpoint))
    summary: dict[str, Any] = {
        "steps": result.global_step,
        "seconds": round(seconds, 2),
        "train_loss": result.training_loss if trained else None,
        "eval_loss": _final_loss(trainer) if rows.held_back is not None else None,
        "train_rows": len(rows.train),
        "eval_rows": len(rows.held_back) if rows.held_back is not None else 0,
        "peak_memory_bytes": _peak_memory(),
        "resumed_from": str(checkpoint) if checkpoint else None,
        "report": _report(settings),
    }
    _refuse_no_numbers(trainer, summary["eval_loss"])
    saved, differs = save_results(config, trainer.model, trainer.processing_class)
    summary |= saved
    _show(summary)
    if as_json:
        say(json.dumps(summary))
    if differs is not None:
        raise differs
    return 0


def make_trainer(config: RunConfig, settings: Any) -> tuple[Any, Rows]:
    """The trainer of a run, and its rows."""
    from pronghorn.cli.rows import load_rows

    adapter_arguments(config)  # refuses an unknown key before anything is read
    rows = load_rows(config)
    if "assistant_only_loss" not in config.training.other:
        settings.assistant_only_loss = config.data.responses_only and rows.are_chats
    model, tokenizer = load_model(config)
    from pronghorn import SFTTrainer

    with rows.naming_lines():
        try:
            trainer = SFTTrainer(
                model=model,
                args=settings,
                processing_class=tokenizer,
                train_dataset=rows.train,
                eval_dataset=rows.held_back,
            )
        except (ValueError, ImportError) as error:  # what TRL and Transformers refuse
            raise _not_together(config, error) from error
    trainer.row_numbers = rows.train_numbers
    return trainer, rows


def training_settings(config: RunConfig) -> Any:
    """The SFTConfig of a run.

    Raises:
        ConfigInvalid: a key under ``training`` that SFTConfig does not have.
    """
    from pronghorn import SFTConfig

    values = section_arguments(config, "training", field_types(SFTConfig))
    values.setdefault("output_dir", config.output.folder)
    values.setdefault("report_to", "none")
    # Without it, the table of steps would follow the verbosity of Transformers, which a command lowers.
    values.setdefault("disable_tqdm", False)
    if not config.data.responses_only:
        values.setdefault("completion_only_loss", False)
    if config.data.text_field is not None:
        values.setdefault("dataset_text_field", config.data.text_field)
    if config.data.evaluates and "eval_steps" in values:
        values.setdefault("eval_strategy", "steps")
    _check_names(config, values)
    try:
        return SFTConfig(**values)
    except UnknownArgument as error:
        key = error.message.partition("=")[0]
        error.where = error.where or config.where(f"training.{key}" if key in values else "training")
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise _not_together(config, error) from error


def _not_together(config: RunConfig, error: Exception) -> ConfigInvalid:
    return ConfigInvalid(
        f"these training arguments do not go together: {first_line(error)}",
        where=config.where("training"),
        fix="change the argument it names",
    )


def _check_names(config: RunConfig, values: dict[str, Any]) -> None:
    """Names that Transformers would refuse with the list of all, and keys without effect here.

    Raises:
        ConfigInvalid: with the nearest one.
    """
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    if values.get("resume_from_checkpoint") is not None:
        raise ConfigInvalid(
            "'training.resume_from_checkpoint' has no effect in a file",
            where=config.where("training.resume_from_checkpoint"),
            fix="remove it; `pronghorn train --resume` goes on from the newest checkpoint in output.folder",
        )
    if values.get("eval_on_start") and not config.data.evaluates:
        raise ConfigInvalid(
            "'training.eval_on_start' needs rows to evaluate on",
            where=config.where("training.eval_on_start"),
            fix="set data.held_back to how many rows are held back, or data.eval_dataset to a file of them",
        )
    for key, kind in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        known = [item.value for item in kind]
        if values.get(key, known[0]) not in known:
            raise ConfigInvalid(
                f"'training.{key}' cannot be '{values[key]}'",
                where=config.where(f"training.{key}"),
                fix=nearest(values[key], known) or f"give one of {', '.join(known)}",
            )


def field_types(kind: type) -> dict[str, Any]:
    """The types of a dataclass's arguments by name."""
    hints = get_type_hints(kind)
    return {item.name: hints.get(item.name, Any) for item in dataclasses.fields(kind) if item.init}


def load_model(config: RunConfig) -> tuple[Any, Any]:
    """(model with its adapter, or all its weights to train; tokenizer)."""
    from pronghorn import FastLanguageModel

    adapter = adapter_arguments(config)
    model, tokenizer = load_base(config)
    if not config.model.full_finetuning:
        model = FastLanguageModel.get_peft_model(model, **adapter)
    return model, tokenizer


def load_base(config: RunConfig) -> tuple[Any, Any]:
    """(model without an adapter, tokenizer)."""
    from pronghorn import FastLanguageModel

    loading = arguments(config.model)
    loading["model_name"] = resolve_model(loading["model_name"])
    return FastLanguageModel.from_pretrained(**loading)


def adapter_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments of `get_peft_model`."""
    from peft import LoraConfig

    adapter = section_arguments(config, "adapter", field_types(LoraConfig))
    if config.model.use_gradient_checkpointing is not None:  # get_peft_model's default would take its place
        adapter.setdefault("use_gradient_checkpointing", config.model.use_gradient_checkpointing)
    return adapter


def save_results(
    config: RunConfig, model: Any, tokenizer: Any
) -> tuple[dict[str, str | None], ExportDiffers | None]:
    """Save what ``output`` asks for; the paths by what they hold, and what an export that differs says of itself: it is
    kept, and so is what comes after it."""
    from pronghorn.export import save_adapter, save_merged

    folder, output = Path(config.output.folder), config.output
    saved: dict[str, str | None] = {"adapter": None, "model": None, "merged": None}
    wanted: list[tuple[str, Callable[[Path], Any]]] = []
    if config.model.full_finetuning:
        wanted.append(("model", partial(save_merged, model, tokenizer)))
    elif output.save_adapter:
        wanted.append(("adapter", partial(save_adapter, model, tokenizer)))
    if output.save_merged is not None and not config.model.full_finetuning:
        method = output.save_merged
        wanted.append(("merged", lambda path: save_merged(model, tokenizer, path, method)))
    differs: ExportDiffers | None = None
    for name, save in wanted:
        saved[name] = str(folder / name)
        try:
            save(folder / name)
        except ExportDiffers as error:
            differs = error
    return saved, differs


def _train(trainer: Any, checkpoint: Path | None) -> Any:
    """Train; running out of GPU memory becomes an error with what helps.

    Raises:
        OutOfMemory: the GPU's memory did not suffice.
    """
    import torch

    try:
        return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        from pronghorn.training.shortage import shortage

        raise shortage(trainer, f"step {trainer.state.global_step + 1}: {first_line(error)}") from None


def _refuse_no_numbers(trainer: Any, eval_loss: float | None) -> None:
    """Raise where what was trained answers with no numbers: it would be saved as though it were of use.

    Raises:
        NonFiniteLoss: the losses from some step to the end, or the loss on held-back rows, are no numbers, and no
            better weights from before were loaded.
    """
    since = trainer._ledger.ended_without_number()
    if since is not None and _step_of_weights(trainer) < since:
        since = None
    if since is None and (eval_loss is None or math.isfinite(eval_loss)):
        return
    what = (
        f"the loss is no number from step {since} to the end"
        if since
        else f"the held-back loss is {eval_loss}"
    )
    raise NonFiniteLoss(
        f"{what}: what was trained is of no use, and is not saved",
        where=str(trainer.args.output_dir),
        fix=f"train again with a lower learning_rate (it was {trainer.args.learning_rate:g}) or more warmup_steps; "
        "a checkpoint from before that step can be gone on from once later ones are removed",
    )


def _final_loss(trainer: Any) -> float:
    """Loss on the held-back rows of the weights that a run ends with, measured unless that was done at their step."""
    step = _step_of_weights(trainer)
    for entry in reversed(trainer.state.log_history):
        if entry.get("step") == step and "eval_loss" in entry:
            return float(entry["eval_loss"])
    return float(trainer.evaluate()["eval_loss"])


def _step_of_weights(trainer: Any) -> int:
    """The step that the weights are of: the last one, or the best where these were loaded at the end."""
    state = trainer.state
    loaded = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    best = state.best_global_step if loaded else None
    return int(state.global_step if best is None else best)


def _newest_checkpoint(output_dir: str) -> Path:
    from pronghorn.training.checkpoints import newest_checkpoint

    return newest_checkpoint(output_dir)


def _report(settings: Any) -> str | None:
    """The page that the run has left, if any."""
    from pronghorn.training.report import REPORT

    page = Path(settings.output_dir) / REPORT
    return str(page) if settings.report and page.is_file() else None


def _peak_memory() -> int | None:
    """Most bytes that were reserved on the GPU; None without one."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def _show(summary: dict[str, Any]) -> None:
    heading("Trained")
    rows = [("steps", f"{summary['steps']} in {duration(summary['seconds'])}")]
    if summary["train_loss"] is None:
        why = "the checkpoint is at the last step" if summary["resumed_from"] else "nothing was to be trained"
        rows.append(("training loss", f"none: {why} (training.max_steps)"))
    else:
        since = f" (since {Path(summary['resumed_from']).name})" if summary["resumed_from"] else ""
        rows.append(("training loss", f"{summary['train_loss']:.4f}{since}"))
    if summary["eval_loss"] is not None:
        rows.append(("held-back loss", f"{summary['eval_loss']:.4f} ({summary['eval_rows']} rows)"))
    if summary["peak_memory_bytes"]:
        rows.append(("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"))
    rows += [(kind, summary[kind]) for kind in ("adapter", "model", "merged", "report") if summary[kind]]
    table("Run", ("what", "value"), rows)
