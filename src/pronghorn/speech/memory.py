"""What a step of `DualARModel` takes: the fast transformer runs between the slow one's forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from pronghorn.blocks import LEVELS
from pronghorn.data.budgets import power_of_two, token_budget
from pronghorn.data.collator import BOOKKEEPING
from pronghorn.data.split import split_batch
from pronghorn.engine import Binding, TrainingStep, base_causal_lm
from pronghorn.engine.planning import apply, device_limits, placed_bytes, shape_of
from pronghorn.errors import BudgetTooSmall
from pronghorn.memory import Batch, Inner, Plan, estimate, gib, step_time, with_margin
from pronghorn.speech.task import SpeechTask, decoders_of
from pronghorn.training.memory import RunMemory


class SpeechMemory(RunMemory):
    """Of a `SpeechTrainer`."""

    bookkeeping = (*BOOKKEEPING, "frames")

    @property
    def bindings(self) -> list[Binding]:
        return decoders_of(self.trainer.model) or []

    def task(self) -> SpeechTask:
        return SpeechTask(self.trainer.model, self.trainer.args.code_weight)

    def largest(self) -> Batch:
        """Of the slow transformer. All rows are known: its longest one times the rows of a batch."""
        rows, count = self.trainer.train_dataset, self.trainer.args.per_device_train_batch_size
        tokens = count * max(len(row["input_ids"]) for row in rows)
        return Batch(tokens, tokens, count)

    def frames(self) -> int:
        """Of the largest batch, rounded up as the collator does."""
        first, last = self.trainer.data_collator.semantic
        rows, count = self.trainer.train_dataset, self.trainer.args.per_device_train_batch_size
        most = max(int(((row["labels"] >= first) & (row["labels"] <= last)).sum()) for row in rows)
        return min(token_budget(most * count), self.largest().tokens)

    def plan(self, budget: str | int, batch: Batch) -> Plan:
        """The fastest pair of levels, one for each transformer, that fits.

        Raises:
            BudgetTooSmall: none does, with what the leanest takes.
        """
        slow, fast = self.bindings
        limits = device_limits(slow, budget)
        books = base_causal_lm(self.trainer.model).config.num_codebooks
        frames = self.frames()
        inner_batch = Batch(frames * books, frames * books, frames)
        shapes = shape_of(slow, placed=placed_bytes(slow)), shape_of(fast)
        found = []
        for levels in product(LEVELS, LEVELS):
            inner = Inner(shapes[1], levels[1], inner_batch)
            taken = estimate(
                shapes[0], levels[0], batch, capability=limits.rates.capability, inner=inner,
                more=self._besides(),
            )  # fmt: skip
            times = [
                step_time(shape, [level] * shape.layers, of, limits.rates)
                for shape, level, of in zip(shapes, levels, (batch, inner_batch), strict=True)
            ]
            if limits.host is None or taken.host <= limits.host:
                found.append((sum(time.total for time in times), taken, levels, times[0]))
        fitting = [one for one in found if with_margin(one[1].reserved, shapes[0]) <= limits.budget]
        if not fitting:
            least = with_margin(min(taken.reserved for _, taken, *_ in found), shapes[0])
            raise BudgetTooSmall(
                f"a step of {batch.tokens:,} tokens with {frames:,} frames does not fit into {gib(limits.budget)}: the "
                f"leanest plan for it takes {gib(least)}",
                fix="lower per_device_train_batch_size or cut recordings into shorter ones, or raise memory_budget to "
                f"{gib(least)}",
            )
        seconds, taken, levels, time = min(fitting, key=lambda one: one[0])
        reason = f"slow transformer at '{levels[0]}', fast transformer at '{levels[1]}'"
        plans = [
            Plan(
                (level,) * shape.layers,
                None,
                limits.budget,
                of,
                taken,
                replace(time, total=seconds),
                (reason,),
            )
            for shape, level, of in zip(shapes, levels, (batch, inner_batch), strict=True)
        ]
        for binding, one, shape in zip((slow, fast), plans, shapes, strict=True):
            apply(binding, one, shape)
        return plans[0]

    def _besides(self) -> list[int]:
        """Bytes of what both transformers share: embeddings of codes and the projection between them."""
        base = base_causal_lm(self.trainer.model)
        return [
            p.nbytes for part in (base.codebook_embeddings, base.fast_project_in) for p in part.parameters()
        ]

    def rehearse(self, step: TrainingStep, batch: Batch) -> None:
        assert isinstance(step.task, SpeechTask)
        documents, longest = power_of_two(batch.documents), batch.tokens // batch.documents
        step.rehearse(
            step.task.nonsense(
                self.trainer.args.device,
                batch.tokens,
                batch.loss_rows,
                self.frames(),
                documents,
                min(power_of_two(longest), batch.tokens),
            ),
            counts=2,
        )

    def split(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        parts = split_batch(batch)
        first, last = self.trainer.data_collator.semantic
        for part in parts or ():
            successors = part["labels"][0, 1:]
            part["frame_rows"] = ((successors >= first) & (successors <= last)).nonzero().squeeze(1)
        return parts
