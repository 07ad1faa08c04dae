"""A trainer lent for short trainings that leave no trace: learning-rate tests, and whatever compares settings.

Everything a training changes is put back bit by bit: trained parameters, the trainer's own attributes (state,
optimizer, scheduler, callbacks, arguments), random numbers, and with them the order of the data; nothing is written and
nobody is told. What costs time to make and holds nothing of the run is kept: the wrapped model and the memory plan.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy
import torch
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
)

from pronghorn.errors import DatasetUnusable, TrainerBusy
from pronghorn.training.ledger import StepLedger

#: Attributes of a trainer that stay as a training leaves them.
_KEPT = ("model", "model_wrapped", "deepspeed", "_steps")
#: What a short training does differently from the run.
_QUIET: dict[str, Any] = {
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_first_step": False,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "disable_tqdm": True,
}

RateAt = Callable[[int], float]


class Borrowed:
    """Short trainings on a lent trainer; see `borrow`."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        model = trainer.model
        self._attributes = dict(trainer.__dict__)
        self._modes = {module: module.training for module in model.modules()}
        self._trained = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
        self._gradients = {p: None if p.grad is None else p.grad.clone() for p in self._trained}
        self._random = _random_state()

    def train(
        self, steps: int, rate_at: RateAt, stop: Callable[[list[float]], bool] | None = None
    ) -> list[float]:
        """Train from where the model is now; returns each step's loss.

        Args:
            rate_at: the learning rate of a step, counted from 0.
            stop: is shown the losses so far after each step; True ends the training.
        """
        trainer, watch = self.trainer, _Steering(rate_at, stop)
        self._prepare(steps, watch)
        trainer.train()
        return watch.losses

    def losses(self, steps: int) -> list[float]:
        """The losses of the batches that `train` would meet, at the parameters as they are now."""
        trainer, found = self.trainer, []
        loader, model = trainer.get_train_dataloader(), trainer.model
        per_step = trainer.args.gradient_accumulation_steps
        model.eval()
        for epoch in count():
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            batches = iter(loader)
            for _ in range(-(-len(loader) // per_step)):
                samples, items = trainer.get_batch_samples(batches, per_step, trainer.args.device)
                found.append(sum(self._loss(inputs, items) for inputs in samples))
                if len(found) == steps:
                    return found
        raise AssertionError("a loader without rows is refused when the trainer is made")

    def held_out_loss(self) -> float:
        """The loss on the evaluation data, the first of several, at the parameters as they are now."""
        trainer = self.trainer
        self._prepare(1, TrainerCallback())
        trainer.state = copy.copy(trainer.state)
        trainer.state.log_history = []
        metrics = trainer.evaluate()
        return float(next(value for name, value in metrics.items() if name.endswith("loss")))

    def _loss(self, inputs: dict[str, Any], items: Any) -> float:
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            inputs = self.trainer._prepare_inputs(inputs)
            return float(self.trainer.compute_loss(self.trainer.model, inputs, num_items_in_batch=items))

    def rewind(self) -> None:
        """Parameters and random numbers as they were when the trainer was lent."""
        with torch.no_grad():
            for parameter, value in self._trained.items():
                parameter.copy_(value)
                parameter.grad = self._gradients[parameter]
        _set_random_state(self._random)

    def give_back(self) -> None:
        """The trainer as it was lent."""
        self.rewind()
        now = self.trainer.__dict__
        kept = {name: now[name] for name in _KEPT if name in now}
        now.clear()
        now.update({**self._attributes, **kept})
        for module, mode in self._modes.items():
            module.training = mode

    def _prepare(self, steps: int, watch: TrainerCallback) -> None:
        trainer = self.trainer
        args = copy.copy(self._attributes["args"])
        for name, value in {**_QUIET, "max_steps": steps}.items():
            setattr(args, name, value)
        trainer.args, trainer.control = args, TrainerControl()
        trainer.optimizer = trainer.lr_scheduler = None
        trainer._numbers, trainer._ledger = _NotWatching(), StepLedger()
        trainer._progress = trainer._recorder = None
        trainer.callback_handler = CallbackHandler(
            [DefaultFlowCallback(), trainer._ledger, watch],
            trainer.model, trainer.processing_class, None, None,
        )  # fmt: skip


@contextmanager
def borrow(trainer: Any) -> Iterator[Borrowed]:
    """Lend a trainer that is not training; at the end it is as it was.

    Raises:
        TrainerBusy: it is in the middle of a training, or starts from a new model every time.
        DatasetUnusable: its rows are a stream.
    """
    if trainer.is_in_train:
        raise TrainerBusy("this trainer is training now", fix="ask before trainer.train(), or after it")
    if trainer.model_init is not None:
        raise TrainerBusy(
            "this trainer makes a new model for every training", fix="give it a model, not model_init"
        )
    if not hasattr(trainer.train_dataset, "__len__"):
        raise DatasetUnusable("a stream of rows cannot be read again and again", fix="give a Dataset")
    lent = Borrowed(trainer)
    try:
        yield lent
    finally:
        lent.give_back()


class _Steering(TrainerCallback):
    """Sets the learning rate before each step and looks at the loss after it."""

    def __init__(self, rate_at: RateAt, stop: Callable[[list[float]], bool] | None) -> None:
        self._rate_at, self._stop = rate_at, stop
        self.losses: list[float] = []

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        rate = self._rate_at(state.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            if self._stop is not None and self._stop(self.losses):
                control.should_training_stop = True


class _NotWatching:
    """In the place of `NumberWatch`: a rate that is too high is what such a training looks for."""

    def saw(self, *args: Any) -> None:
        """A micro-batch."""

    def norm(self, *args: Any) -> None:
        """A gradient's norm."""

    def read(self, *args: Any) -> None:
        """A log."""


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Any, ...]) -> None:
    python, arrays, cpu, cuda = state
    random.setstate(python)
    numpy.random.set_state(arrays)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
