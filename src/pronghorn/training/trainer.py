"""`SFTTrainer`: TRL's trainer with this library's rows, batches, loss, progress and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers.trainer_utils import has_length

from pronghorn.data.collator import BOOKKEEPING
from pronghorn.engine import AUTO, base_causal_lm, bind, binding_of
from pronghorn.errors import UnknownArgument
from pronghorn.loading.arguments import refuse_pair
from pronghorn.training.arguments import take_older_arguments
from pronghorn.training.config import as_sft_config
from pronghorn.training.curve_watch import CurveWatch
from pronghorn.training.flat_adamw import FlatAdamW, clip_flat_
from pronghorn.training.given import as_dataset, training_rows, usable_collator
from pronghorn.training.late_logs import LateLogs
from pronghorn.training.ledger import StepLedger
from pronghorn.training.logits import loss_from_logits, right_predictions
from pronghorn.training.lr_finder import get_best_learning_rate
from pronghorn.training.meter import Stopwatch, Tally, at_least_one, real_tokens, supervised_tokens
from pronghorn.training.nonfinite import NumberWatch
from pronghorn.training.progress import peak_memory_gib
from pronghorn.training.report import RunRecorder
from pronghorn.training.report.facts import values_of
from pronghorn.training.rows import RowsTrainer
from pronghorn.training.safe import SafeTrainer
from pronghorn.training.setup import (
    hidden,
    is_bound,
    model_as_it_is,
    restore_forward,
    settle_arguments,
    take_over_checkpointing,
    vocabulary_of,
    watch_first_evaluation,
)
from pronghorn.training.steps import StaticSteps
from pronghorn.training.vision import vision_collator


class SFTTrainer(SafeTrainer, RowsTrainer):
    """TRL's SFTTrainer on padding-free batches, with a loss over all supervised tokens of the global batch.

        loss = Σ CE over the supervised tokens of all micro-batches and processes / their number

    Takes TRL's arguments, and those of its older versions with a note each (`tokenizer`, `dataset_text_field`,
    `max_seq_length`, `packing`, …). `SFTConfig` lists the defaults that differ. Rows may be chat (`messages`, or
    ShareGPT's `conversations`), prompt/completion, Alpaca, plain text or token rows.

    Raises:
        TypeError: an argument that no version has.
        PronghornError: rows that cannot be trained on (PH3xx), a tokenizer without a chat template (PH104).
    """

    # compute_loss divides by the tokens of the whole step, so nothing is left to divide for accumulation.
    loss_is_scaled_for_ga = True
    get_best_learning_rate = get_best_learning_rate

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., dict] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[..., Any] | None = None,
        **older: Any,
    ) -> None:
        refuse_pair(model)
        args = as_sft_config(args)
        watch_first_evaluation(args, eval_dataset)
        processing_class = take_older_arguments(older, args, processing_class)
        asked = values_of(args)
        settle_arguments(args, model, own_collator=data_collator is not None)
        self._note_wishes(args, model, compute_loss_func, compute_metrics)
        self._given_train = train_dataset = training_rows(train_dataset)
        checkpointing = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
        data_collator = vision_collator(model, args, data_collator, processing_class, train_dataset)
        custom_collator = usable_collator(data_collator, args.packing)
        self._own_batches = custom_collator is None
        with hidden(args), model_as_it_is(model):
            super().__init__(
                model,
                args=args,
                data_collator=custom_collator,
                train_dataset=train_dataset,
                eval_dataset=as_dataset(eval_dataset),
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=peft_config,
                formatting_func=formatting_func,
            )
        del self._given_train
        self.model_accepts_loss_kwargs = True  # what older Transformers ask instead of loss_is_scaled_for_ga
        if isinstance(model, str):  # loaded here
            restore_forward(base_causal_lm(self.model))
        if binding_of(self.model) is None:
            # Who says nothing about checkpointing gets what suits the memory there is.
            bind(self.model, save_levels="all" if args.checkpointing_refused else AUTO)
        take_over_checkpointing(args, self.model, bool(checkpointing))
        if self._own_batches and not self._is_vision_dataset:
            self.data_collator = self._collator()
        self._add_watchers(asked)

    def _note_wishes(self, args: Any, model: Any, loss: Any, metrics: Any) -> None:
        """What TRL is not shown of the arguments (`setup.hidden`), and counts that begin at zero."""
        self._context = getattr(model, "max_seq_length", None)
        self._vocabulary = vocabulary_of(model)
        self._packing, self._eval_packing = args.packing, args.eval_packing
        self._responses_only = args.assistant_only_loss
        self._loss_function, self._wants_rows = loss, metrics is not None
        self._training, self._evaluation, self._watch = Tally(), Tally(), Stopwatch()
        self._trained_tokens, self._numbers, self._ledger = 0, NumberWatch(self), StepLedger()
        self._late = LateLogs(self, super()._maybe_log_save_evaluate)
        self._left_over: list[Any] = []
        self._parameter_count: int | None = None

    def _add_watchers(self, asked: dict[str, Any]) -> None:
        """Who reads along: numbers, the ledger of steps, the table, curves, and the report with the settings `asked`
        for."""
        self.add_callback(self._numbers)
        self.add_callback(self._ledger)
        self.add_callback(self._late)
        self._show_progress()
        self._curves = CurveWatch(self)
        self.add_callback(self._curves)
        self._recorder = RunRecorder(self, asked) if self.args.report else None
        if self._recorder is not None:
            self.add_callback(self._recorder)

    # --- loss -------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Supervised tokens of one step: of all its micro-batches and, in distributed training, of all processes."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        count = sum(supervised_tokens(batch) for batch in batch_samples)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            local = torch.as_tensor(count, device=device)
            return self.accelerator.gather(local).sum() / (
                self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
            )
        return count

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """The micro-batches of one step, and their supervised tokens. A stream's last ones, where they are too few for
        a step, begin its next round: Transformers would add their gradient to that of a whole step.

        Raises:
            UnknownArgument: a stream's round has fewer batches than one step takes.
        """
        if has_length(self.train_dataset):
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [*self._left_over, *islice(epoch_iterator, num_batches - len(self._left_over))]
        self._left_over = [] if len(batches) == num_batches else batches
        if self._left_over:
            if not self.state.global_step:  # Transformers would end here, with nothing trained
                raise UnknownArgument(
                    f"a step takes {num_batches} batches (gradient_accumulation_steps), and the stream has "
                    f"{len(batches)}",
                    fix=f"set gradient_accumulation_steps to {len(batches)} at most, or give more rows",
                )
            return [], None
        return batches, self._get_num_items_in_batch(batches, device)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self._watch.start()
        inputs = self._prepare_inputs(inputs)
        normalizer = at_least_one(
            supervised_tokens(inputs) if num_items_in_batch is None else num_items_in_batch
        )
        output = self._static_steps().run(inputs, normalizer)
        if output is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss, tokens = output.loss, real_tokens(inputs)
            self._training.add(
                supervised=supervised_tokens(inputs), correct=output.num_correct, tokens=tokens
            )
        # Behind the launch of this step, and before what is known of it only later.
        self._late.write()
        # First what is kept: the other may end the run.
        self._ledger.saw(loss, self._numbers_of(inputs.get("rows", ())))
        self._numbers.saw(inputs, normalizer, loss)
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own, but for torch's fused AdamW, which takes adapters that lie side by side as one tensor."""
        given: Any = self.optimizer  # type: ignore[has-type]
        optimizer = super().create_optimizer(*args, **kwargs)
        fused = type(optimizer) is torch.optim.AdamW and all(
            group["fused"] for group in optimizer.param_groups
        )
        if fused and given is None:
            self.optimizer = FlatAdamW.like(optimizer, lambda: self._static_steps().flats())
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        gradient = self._static_steps().whole_gradient()
        if gradient is None:
            return super()._clip_grad_norm(model)
        return clip_flat_(gradient, self.args.max_grad_norm)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self._ledger.norm(norm)
        self._numbers.norm(norm)
        return norm

    def _static_steps(self) -> StaticSteps:
        if self._steps is None:
            self._steps = StaticSteps(self, self._why_own_loss())
        return self._steps

    def _why_own_loss(self) -> str | None:
        """Why the loss is not the engine's, or None."""
        if type(self).compute_loss is not SFTTrainer.compute_loss or "compute_loss" in self.__dict__:
            return f"{type(self).__name__} computes its loss itself"
        if self._loss_function is not None or self.label_smoother is not None or self.args.loss_type == "dft":
            return "the loss is not the plain cross-entropy"
        return None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Transformers' estimate; the parameters are counted once instead of with every micro-batch."""
        if "input_ids" not in inputs or not hasattr(self.model, "num_parameters"):
            return super().floating_point_ops(inputs)
        if self._parameter_count is None:
            self._parameter_count = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._parameter_count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one micro-batch, its share of the step's mean. Nothing here waits for the device."""
        supervised, tokens = supervised_tokens(inputs), real_tokens(inputs)
        normalizer = supervised if num_items_in_batch is None else num_items_in_batch
        loss, correct, outputs = self._forward(model, inputs, normalizer, want_logits=return_outputs)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is that of all processes, over which DDP will average the gradients.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.model.training:
            self._training.add(supervised=supervised, correct=correct, tokens=tokens)
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self, model: Any, inputs: dict[str, Any], normalizer: Any, want_logits: bool = False
    ) -> tuple[torch.Tensor, Any, Any]:
        """(loss, number of right predictions, outputs); loss = Σ CE / max(normalizer, 1), plus a router's part."""
        inputs = {name: value for name, value in inputs.items() if name not in BOOKKEEPING}
        inputs["use_cache"] = False
        normalizer = at_least_one(normalizer)
        special = self._loss_function is not None or self.label_smoother is not None
        if is_bound(self.model) and not special and self.args.loss_type != "dft":
            if not self.model.training:
                inputs["return_logits"] = want_logits
            outputs = model(**inputs, num_items_in_batch=normalizer)
            correct = getattr(outputs, "num_correct", None)
            if correct is None:  # the head ran through its own forward, which counts nothing
                correct = right_predictions(outputs.logits, inputs["labels"])
            return outputs.loss, correct, outputs
        labels = inputs.pop("labels")
        inputs.pop("loss_rows", None)
        inputs.pop("document_lengths", None)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs)
        loss, correct = loss_from_logits(
            outputs, labels, normalizer, self._loss_function, self.label_smoother, self.args.loss_type
        )
        # Some models' configs have a weight for the balance of experts, and their forward gives none.
        if self.aux_loss_enabled and getattr(outputs, "aux_loss", None) is not None:
            steps = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss.to(loss.device) / steps
        return loss, correct, outputs

    # --- evaluation -------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Loss of one batch, counted for the exact mean; logits and labels only where metrics need them."""
        inputs = self._prepare_inputs(inputs)
        supervised = supervised_tokens(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            total, correct, outputs = self._forward(model, inputs, 1, want_logits=not prediction_loss_only)
        self._evaluation.add(loss=total, supervised=supervised, correct=correct)
        loss = total / at_least_one(supervised)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs.logits, inputs["labels"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loop of Transformers, with the loss over all supervised tokens instead of the mean of batch means."""
        self._evaluation = Tally()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        sums = self._evaluation.read(self.accelerator)
        if sums.supervised:
            output.metrics[f"{prefix}_loss"] = sums.mean_loss
            output.metrics[f"{prefix}_mean_token_accuracy"] = sums.accuracy
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        work = partial(super().evaluate, *args, **kwargs)
        with self._not_training():
            return work() if self._steps is None else self._steps.beside(work)

    # --- logs -------------------------------------------------------------------------------------------------

    def _send_telemetry(self) -> None:
        """Nothing is sent."""

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._late.write()
        if not self._late.postpones(tr_loss, grad_norm, args, kwargs):
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds accuracy, speed and memory to a training log; a loss that is no number is told once."""
        late = self._late.being_written
        if late is None:  # somebody else's log comes behind the one that waits
            self._late.write()
        if "loss" in logs:
            sums = self._training.read(self.accelerator) if late is None else Tally.of(late.sums.read())
            seconds = self._watch.lap()
            self._trained_tokens += sums.tokens
            logs["mean_token_accuracy"] = sums.accuracy
            logs["num_tokens"] = self._trained_tokens
            if seconds > 0:
                logs["tokens_per_second"] = round(sums.tokens / seconds, 1)
            logs["peak_memory_gib"] = round(peak_memory_gib(), 3)
            if late is None:
                self._ledger.read(self.accelerator)
            else:
                self._ledger.take(late.steps)
            self._numbers.read(logs)
        elif "train_loss" in logs:  # the end: steps since the last log
            self._ledger.read(self.accelerator)
        super().log(logs, start_time)

    @contextmanager
    def _while_training(self) -> Iterator[None]:
        self._training, self._left_over = Tally(), []
        with super()._while_training(), self._recorder.of_run() if self._recorder else nullcontext():
            try:
                yield
            except BaseException:
                self._late.write_after_error()
                raise
            self._late.write()
