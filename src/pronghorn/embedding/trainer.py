"""`EmbeddingTrainer`: Transformers' Trainer on batches of pairs, whose rows are each other's negatives."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pronghorn.embedding.batches import PairCollator, TokenPair, tokenize_pairs
from pronghorn.embedding.config import EmbeddingConfig
from pronghorn.embedding.evaluation import evaluate_pairs
from pronghorn.embedding.gradient_cache import backward, in_two_passes
from pronghorn.embedding.layout import Pooling, write_layout
from pronghorn.embedding.memory import EmbeddingMemory, halved
from pronghorn.embedding.model import embedder_of
from pronghorn.embedding.rows import as_pairs, read_pairs
from pronghorn.embedding.task import FACTS, pass_over
from pronghorn.embedding.vectors import Batcher, forward, width_of
from pronghorn.errors import CommandMisused, OutOfMemory, UnknownArgument
from pronghorn.training.arguments import usable_optimizer
from pronghorn.training.meter import Stopwatch
from pronghorn.training.progress import peak_memory_gib
from pronghorn.training.safe import SafeTrainer
from pronghorn.training.setup import match_precision, take_over_checkpointing, use_one_gpu
from pronghorn.training.steps import StaticSteps

logger = logging.getLogger("pronghorn")


class EmbeddingTrainer(SafeTrainer):
    """Contrastive training of a model of `FastEmbeddingModel`.

    Rows are dictionaries, a `datasets.Dataset` or a file: {"anchor", "positive"} or {"query", "document"}, with
    "negative" columns where there are hard negatives, or {"sentence1", "sentence2", "score"}.

    Raises:
        PronghornError: rows that cannot be trained on (PH3xx), a loss that does not fit them.
    """

    control: Any
    data_collator: Any

    def __init__(
        self,
        model: Any,
        args: EmbeddingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args or EmbeddingConfig()
        embedder = embedder_of(model)
        if args.world_size > 1:
            raise CommandMisused(
                "embedding models are trained on one GPU: with more, rows would not see the other processes' negatives",
                fix="start one process; a larger batch fits by gradient_cache_texts",
            )
        use_one_gpu(args, model, in_processes=False)
        args.optim = usable_optimizer(str(getattr(args.optim, "value", args.optim)))
        match_precision(args, model)
        take_over_checkpointing(args, model, bool(args.gradient_checkpointing))
        self._embedder, self._given = embedder, args
        self._watch, self._tokens, self._all_tokens = Stopwatch(), 0, 0
        train_rows = None if train_dataset is None else self._rows(train_dataset, "train")
        eval_rows = None if eval_dataset is None else self._rows(eval_dataset, "eval")
        known = train_rows or eval_rows or []
        self.objective = args.objective(bool(known) and known[0].score is not None, width_of(model))
        if train_rows is not None:
            self._check_negatives(train_rows, args)
            # A last batch of a few rows would hold few negatives.
            args.dataloader_drop_last |= len(train_rows) >= args.train_batch_size
        super().__init__(
            model,
            args=args,
            data_collator=PairCollator(
                Batcher(model, embedder.tokenizer.pad_token_id), args.gradient_cache_texts
            ),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=embedder.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._parameter_count = sum(parameter.numel() for parameter in model.parameters())
        self._show_progress()

    def _rows(self, rows: Any, what: str) -> list[TokenPair]:
        """Rows of any kind as tokens, with the prompts of their sides."""
        layout, args = self._embedder.layout, self._given
        pairs = read_pairs(rows) if isinstance(rows, str | os.PathLike) else as_pairs(rows, what)
        scored = pairs[0].score is not None
        prompts = [
            given
            if given is not None
            else layout.prompt(name if name in layout.prompts and not scored else None)
            for name, given in (("query", args.query_prompt), ("document", args.document_prompt))
        ]
        return tokenize_pairs(pairs, self._embedder.tokenizer, layout.max_seq_length, *prompts)

    def _check_negatives(self, rows: Sequence[TokenPair], args: EmbeddingConfig) -> None:
        """Raises:
        UnknownArgument: the loss has nothing to tell a positive from.
        """
        if any(len(row.texts) > 2 for row in rows):
            return
        if self.objective.name == "triplet":
            raise UnknownArgument(
                "loss='triplet' needs rows with a negative", fix="add a column 'negative', or use info_nce"
            )
        if self.objective.name == "info_nce" and args.train_batch_size < 2:
            raise UnknownArgument(
                "a batch of one row without negatives teaches nothing",
                fix="set per_device_train_batch_size to 2 or more",
            )

    # --- a step -----------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch, in its parts; returns its share of the step's loss."""
        self._watch.start()
        model.train()
        batch = self._prepare_inputs(inputs)
        self._tokens += batch["tokens"]
        loss = self._in_static_steps(batch)
        if loss is not None:
            return loss

        def vectors_of_part(part: Any) -> Tensor:
            with self.compute_loss_context_manager():
                return forward(model, part, self.pooling)

        return backward(batch["parts"], vectors_of_part, self._loss_of(batch), self.accelerator.backward)

    @property
    def pooling(self) -> Pooling:
        """How a text's vector is made of its tokens'."""
        return self._embedder.pooling

    def _loss_of(self, batch: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """A batch's share of the step's loss, of its parts' vectors."""
        share = 1 / self.current_gradient_accumulation_steps
        return lambda vectors: (
            share * self.objective(vectors.index_select(0, batch["places"]), batch["facts"])
        )

    def _in_static_steps(self, batch: dict[str, Any]) -> Tensor | None:
        """The same in passes of static shape, or None where these cannot be. A batch that does not fit in one part runs
        in two from there on, with the same loss and gradients."""
        steps, parts = self._static_steps(), batch["parts"]
        share = self.current_gradient_accumulation_steps
        if len(parts) == 1:
            facts = {"places": batch["places"], **batch["facts"]}
            facts = {name: facts[name] for name in FACTS if facts[name] is not None}
            try:
                whole = steps.run(pass_over(parts[0], **facts), share)
                return None if whole is None else whole.loss  # type: ignore[no-any-return]
            except OutOfMemory:
                halves = halved(parts[0])
                if halves is None:
                    raise
                parts = halves
        elif not steps.takes(pass_over(parts[0])):
            return None
        return in_two_passes(
            parts,
            lambda part: steps.run(pass_over(part), 1).vectors,
            self._loss_of(batch),
            lambda part, gradient: steps.run(pass_over(part, gradient=gradient), 1),
        )

    def _static_steps(self) -> StaticSteps:
        if self._steps is None:
            self._steps = StaticSteps(self, None, EmbeddingMemory(self))
        return self._steps

    def get_train_dataloader(self) -> Any:
        collator = self.data_collator
        budgets = self._static_steps().budgets()
        batcher = Batcher(self.model, self._embedder.tokenizer.pad_token_id, budgets)
        self.data_collator = replace(collator, batcher=batcher)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations for each weight and token, as Transformers estimates them."""
        return 6 * int(inputs["tokens"]) * self._parameter_count

    # --- evaluation and logs ----------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and retrieval of held-back rows, or the rank correlation of scored ones; see `evaluate_pairs`."""
        rows = self.eval_dataset if eval_dataset is None else self._rows(eval_dataset, "eval")
        with self._not_training():
            found = evaluate_pairs(self.model, rows, self.objective, self.args.eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds speed and memory to a training log."""
        if "loss" in logs:
            seconds = self._watch.lap()
            self._all_tokens += self._tokens
            logs["num_tokens"] = self._all_tokens
            if seconds > 0:
                logs["tokens_per_second"] = round(self._tokens / seconds, 1)
            logs["peak_memory_gib"] = round(peak_memory_gib(), 3)
            self._tokens = 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        write_layout(folder, self._embedder.layout, width_of(self.model))
