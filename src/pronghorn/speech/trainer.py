"""Training of `DualARModel`: Transformers' trainer with two losses, each a mean over the whole step.

    loss = Σ CE of tokens / supervised tokens of the step + code_weight · Σ CE of codes / (K · frames of the step)

However the rows of a step are spread over micro-batches and processes, loss and gradients are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainingArguments

from pronghorn.engine import base_causal_lm, binding_of
from pronghorn.errors import DatasetUnusable
from pronghorn.speech.collator import SpeechCollator
from pronghorn.speech.memory import SpeechMemory
from pronghorn.speech.model import DualAROutput
from pronghorn.speech.task import SpeechOutput
from pronghorn.speech.tokenizer import SpeechTokenizer
from pronghorn.training.config import check_budget
from pronghorn.training.meter import Stopwatch, Tally, at_least_one
from pronghorn.training.progress import peak_memory_gib
from pronghorn.training.safe import SafeTrainer
from pronghorn.training.setup import use_one_gpu
from pronghorn.training.steps import StaticSteps

#: The argument's two names.
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


@dataclass
class SpeechConfig(TrainingArguments):
    """Transformers' arguments. What differs:

    - `code_weight`: weight of the codes' loss beside the tokens'.
    - `gradient_checkpointing=True` chooses the leanest save level of both transformers.
    - `memory_budget`: what the GPU may be filled up to, as a size ("8GiB") or "auto"; None keeps the levels as they are
      unless the largest batch does not fit.
    - the rate is one for LoRA, batches keep all columns, and nothing is reported anywhere unless asked for.
    """

    code_weight: float = field(default=1.0, metadata={"help": "weight of the codes' loss beside the tokens'"})
    memory_budget: str | None = field(default=None, metadata={"help": "GPU memory, as 8GiB, or auto"})
    learning_rate: float = field(default=2e-4, metadata={"help": "the highest one of the schedule"})
    logging_steps: float = field(default=1, metadata={"help": "steps between logs"})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "rows have no others"})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "where logs go besides"})

    def __post_init__(self) -> None:
        check_budget(self.memory_budget)
        super().__post_init__()


class Counts(NamedTuple):
    """What one optimizer step's losses are divided by: supervised tokens, and codes of supervised frames."""

    tokens: Any
    codes: Any


class SpeechTrainer(SafeTrainer):
    """Trains a model of `load_speech`, or its adapter, on rows of `SpeechRows`.

    Args:
        train_dataset, eval_dataset: sequences of rows.

    Raises:
        DatasetUnusable: there are no rows.
    """

    data_collator: Any

    def __init__(
        self,
        model: Any,
        args: SpeechConfig,
        tokenizer: SpeechTokenizer,
        train_dataset: Sequence[Any],
        eval_dataset: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not len(train_dataset):
            raise DatasetUnusable("there are no rows to train on", fix="check the file")
        use_one_gpu(args, model)
        base = base_causal_lm(model)
        self._books = base.config.num_codebooks
        self._tokens, self._codes = Tally(), Tally()
        self._watch = Stopwatch()
        if any(getattr(args, name, False) for name in _CHECKPOINTING):
            for decoder in (base.slow, base.fast):
                binding_of(decoder).set_save_levels("none")  # type: ignore[union-attr]
            for name in _CHECKPOINTING:
                setattr(args, name, False)
        super().__init__(
            model=model,
            args=args,
            data_collator=SpeechCollator(tokenizer.semantic),
            train_dataset=train_dataset,  # type: ignore[arg-type]
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            **kwargs,
        )
        # Both losses are divided by the step's own counts; versions of Transformers ask either.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._show_progress()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Counts | None:
        if not batch_samples:
            return None
        counts = [sum(batch[name] for batch in batch_samples) for name in ("supervised", "frames")]
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(torch.tensor(counts, device=device), reduction="sum").tolist()
        return Counts(at_least_one(counts[0]), at_least_one(counts[1] * self._books))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._watch.start()
        inputs = self._prepare_inputs(inputs)
        counts = num_items_in_batch or self._counts_of(inputs)
        output = self._static_steps().run(inputs, tuple(counts))
        if output is None:
            return super().training_step(model, inputs, num_items_in_batch)
        _count(self._tokens, self._codes, inputs, output, counts, self._books)
        return output.loss  # type: ignore[no-any-return]

    def _static_steps(self) -> StaticSteps:
        if self._steps is None:
            own = type(self).compute_loss is not SpeechTrainer.compute_loss
            reason = f"{type(self).__name__} computes its loss itself" if own else None
            self._steps = StaticSteps(self, reason, SpeechMemory(self))
        return self._steps

    def get_train_dataloader(self) -> Any:
        collator = self.data_collator
        self.data_collator = replace(collator, budgets=self._static_steps().budgets())
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Any:
        """Loss of one micro-batch: its share of the step's."""
        counts = num_items_in_batch or self._counts_of(inputs)
        output = self._run(model, inputs, counts)
        loss = output.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The counts are those of all processes, over which DDP will average the gradients.
            loss = loss * self.accelerator.num_processes
        if self.model.training:
            _count(self._tokens, self._codes, inputs, output, counts, self._books)
        return (loss, output) if return_outputs else loss

    def _counts_of(self, inputs: dict[str, Any]) -> Counts:
        return Counts(at_least_one(inputs["supervised"]), at_least_one(inputs["frames"] * self._books))

    def _run(self, model: Any, inputs: dict[str, Any], counts: Counts) -> DualAROutput:
        given = {name: value for name, value in inputs.items() if name not in SpeechMemory.bookkeeping}
        return model(  # type: ignore[no-any-return]
            **given, token_count=counts.tokens, code_count=counts.codes, code_weight=self.args.code_weight
        )

    # --- evaluation -------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Losses of one batch, counted for the exact means."""
        inputs = self._prepare_inputs(inputs)
        counts = self._counts_of(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = self._run(model, inputs, counts)
        _count(*self._evaluated, inputs, output, counts, self._books)
        return output.loss, None, None  # type: ignore[return-value]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' loop, with losses over all supervised tokens and codes instead of means of batch means."""
        self._evaluated = Tally(), Tally()
        result = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        found = self._read(*self._evaluated)
        result.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return result

    # --- logs -------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds both losses with their accuracies, speed and memory to a training log."""
        if "loss" in logs:
            tokens = self._tokens.tokens
            logs |= {
                name: value for name, value in self._read(self._tokens, self._codes).items() if name != "loss"
            }
            seconds = self._watch.lap()
            if seconds > 0:
                logs["tokens_per_second"] = round(int(tokens) / seconds, 1)
            logs["peak_memory_gib"] = round(peak_memory_gib(), 3)
        super().log(logs, start_time)

    def _read(self, tokens: Tally, codes: Tally) -> dict[str, float]:
        """Means since the last reading; without a frame the codes have none."""
        read, frames = tokens.read(self.accelerator), codes.read(self.accelerator)
        found = {"loss": read.mean_loss, "token_loss": read.mean_loss, "token_accuracy": read.accuracy}
        if frames.supervised:
            found |= {"code_loss": frames.mean_loss, "code_accuracy": frames.accuracy}
            found["loss"] += self.args.code_weight * frames.mean_loss
        return found


def _count(
    tokens: Tally,
    codes: Tally,
    inputs: dict[str, Any],
    output: DualAROutput | SpeechOutput,
    counts: Counts,
    books: int,
) -> None:
    """Add a batch's sums of losses to what is counted."""
    tokens.add(
        loss=output.token_loss.detach() * counts.tokens,  # type: ignore[union-attr]
        supervised=inputs["supervised"],
        correct=output.tokens_correct,
        tokens=inputs["real_tokens"],
    )
    codes.add(
        loss=output.code_loss.detach() * counts.codes,  # type: ignore[union-attr]
        supervised=inputs["frames"] * books,
        correct=output.codes_correct,
    )
