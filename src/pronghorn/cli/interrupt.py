"""Ctrl-C while a command trains: the step is finished and saved, so that the run can go on from there."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class StopAfterStep(TrainerCallback):
    """Once asked, saves a checkpoint after the step that runs and ends the training."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


@contextmanager
def stopping_after_step(trainer: Any) -> Iterator[StopAfterStep]:
    """Within it the first Ctrl-C asks; the second one ends the step, as Python does. Signals belong to the main thread:
    in another one everything stays as it is."""
    stop = StopAfterStep()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        print(
            "\npronghorn: stopping after this step, with a checkpoint; Ctrl-C again stops at once",
            file=sys.stderr,
        )

    trainer.add_callback(stop)
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
        trainer.remove_callback(stop)
