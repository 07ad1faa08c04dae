"""What a contrastive step takes: of all texts of a batch, or of one part with the gradient cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pronghorn.data.budgets import power_of_two
from pronghorn.data.split import split_batch
from pronghorn.embedding.task import EmbeddingTask
from pronghorn.engine import TrainingStep
from pronghorn.engine.planning import apply, device_limits, placed_bytes, shape_of
from pronghorn.memory import Batch, Plan, plan
from pronghorn.training.memory import RunMemory


class EmbeddingMemory(RunMemory):
    """Of an `EmbeddingTrainer`."""

    def task(self) -> EmbeddingTask:
        return EmbeddingTask(self.trainer.model, self.trainer.pooling, self.trainer.objective)

    def largest(self) -> Batch:
        """All rows are known: the longest one times the rows of a batch; of a part the longest text times its texts."""
        rows, args = self.trainer.train_dataset, self.trainer.args
        part = args.gradient_cache_texts
        most = max(len(row.texts) for row in rows) * args.per_device_train_batch_size
        if part is not None and part < most:
            tokens, texts = part * max(len(text) for row in rows for text in row.texts), part
        else:
            lengths = max(sum(len(text) for text in row.texts) for row in rows)
            tokens, texts = lengths * args.per_device_train_batch_size, most
        return Batch(tokens, 0, texts)

    def plan(self, budget: str | int, batch: Batch) -> Plan:
        (binding,) = self.bindings
        limits, shape = device_limits(binding, budget), shape_of(binding, placed=placed_bytes(binding))
        # No head. Token vectors in fp32 and their gradient, for the pooling.
        aside = 2 * 4 * batch.tokens * shape.hidden
        found = plan(
            replace(shape, tied=True),
            max(limits.budget - aside, 1),
            batch,
            rates=limits.rates,
            host_limit=limits.host,
        )
        apply(binding, found, shape)
        return found

    def rehearse(self, step: TrainingStep, batch: Batch) -> None:
        assert isinstance(step.task, EmbeddingTask)
        whole = ("places", "scores") if self.trainer.objective.scored else ("places",)
        names = ("gradient",) if self.trainer.args.gradient_cache_texts else whole
        rows = self.trainer.train_dataset
        longest = power_of_two(max(len(text) for row in rows for text in row.texts))
        documents = power_of_two(batch.documents)
        step.rehearse(
            step.task.nonsense(
                self.trainer.args.device, batch.tokens, documents, min(longest, batch.tokens), names
            )
        )

    def split(self, batch: Mapping[str, Any]) -> None:
        """Every text's gradient depends on all vectors: the trainer runs parts twice instead."""
        return


def halved(part: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """A part of `Batcher` as two with about half of the tokens each; None for one text."""
    pieces = split_batch(part["inputs"])
    lengths = part["lengths"][: len(part["lengths"]) - part["filled"]]
    count = 0 if pieces is None else pieces[0]["cu_seq_lens_q"].numel() - 1
    if pieces is None or not 0 < count < len(lengths):
        return None
    filled = part["lengths"].new_zeros(1)
    rest = part["lengths"][count:]
    both = torch.cat([lengths[:count], filled]), rest if part["filled"] else torch.cat([rest, filled])
    return [
        {"inputs": piece, "lengths": of, "kept": None, "filled": True}
        for piece, of in zip(pieces, both, strict=True)
    ]
