"""What a run shows: a table of steps with a live bar on a terminal, the same lines plain elsewhere."""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

#: Figures of an evaluation that are shown besides losses and accuracies: of retrieval, and of scored pairs.
_FIGURES = re.compile(r"@\d+$|_spearman$")
_COLUMNS = (("step", 11), ("loss", 9), ("lr", 10), ("epoch", 7), ("tokens/s", 10), ("memory", 10))


def peak_memory_gib() -> float:
    """Largest memory so far in GiB: reserved on the GPU, or the process's own without one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():  # zero: the run is on the CPU
        return torch.cuda.max_memory_reserved() / 2**30
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def memory_now_bytes(cuda: bool) -> int:
    """Memory of this process as it is now: reserved on the GPU, or in the host's."""
    if cuda:
        return int(torch.cuda.memory_reserved())
    import psutil  # type: ignore[import-untyped]

    return int(psutil.Process().memory_info().rss)


class ProgressTable(TrainerCallback):
    """One line a log, aligned under a header. On a terminal a bar with the remaining time stays below the lines."""

    takes_late_logs = True

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.bar: Progress | None = None
        self.task: Any = None

    def close(self) -> None:
        """Take the bar off the terminal; also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.console.print("".join(name.rjust(width) for name, width in _COLUMNS), style="bold")
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"))
            self.bar = Progress(*columns, *times, console=self.console, transient=True)
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.console.print(self._step_line(logs, state))
        elif line := self._evaluation_line(logs, state):
            self.console.print(line)

    def say(self, text: str, level: str) -> None:
        """A sentence between the lines; `level` is "error", "warning" or "note"."""
        style = {"error": "red", "warning": "yellow"}.get(level)
        self.console.print(f"  {text}", style=style, markup=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def _step_line(self, logs: dict[str, Any], state: Any) -> str:
        shown = (
            f"{state.global_step}/{state.max_steps}",
            f"{logs['loss']:.4f}",
            f"{logs.get('learning_rate', 0.0):.2e}",
            f"{logs.get('epoch', 0.0):.2f}",
            f"{logs['tokens_per_second']:,.0f}" if "tokens_per_second" in logs else "-",
            f"{logs['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in logs else "-",
        )
        return "".join(text.rjust(width) for text, (_, width) in zip(shown, _COLUMNS, strict=True))

    def _evaluation_line(self, logs: dict[str, Any], state: Any) -> str | None:
        """What an evaluation found: losses, accuracies and other figures; None for other logs."""
        losses = [
            f"{key} {value:.4f}"
            for key, value in logs.items()
            if key.endswith("_loss") and key != "train_loss"
        ]
        accuracy = [
            f"{key.removesuffix('_mean_token_accuracy')} accuracy {value:.1%}"
            for key, value in logs.items()
            if key.endswith("_mean_token_accuracy")
        ]
        figures = [f"{key} {value:.4f}" for key, value in logs.items() if _FIGURES.search(key)]
        found = losses + accuracy + figures
        return f"{state.global_step}".rjust(_COLUMNS[0][1]) + "  " + ", ".join(found) if found else None
