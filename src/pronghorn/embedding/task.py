"""A contrastive step as passes of static shape, which `engine.TrainingStep` runs and records.

whole batch          vectors -> loss / share, and its gradients
with gradient cache  vectors of a part;   later, with dL/dv at hand,   Σ v · dL/dv and its gradients
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pronghorn.embedding.layout import Pooling
from pronghorn.embedding.losses import Objective
from pronghorn.embedding.vectors import forward
from pronghorn.engine import Task, binding_of
from pronghorn.engine.tasks import LENGTHS, STREAM, nonsense_stream

#: what the loss knows of a batch besides vectors (`batches.facts_of`), as far as it is tensors
FACTS = ("places", "excluded", "owners", "scores")


class Vectors(NamedTuple):
    """Vectors [n, H] of a part, without a gradient."""

    vectors: Tensor


class Loss(NamedTuple):
    """The share of the step's loss."""

    loss: Tensor


class EmbeddingTask(Task):
    """Passes over texts: with `places` the whole batch's loss, with `gradient` [n, H] a part's gradients, else a part's
    vectors.

    Args:
        model: a bound model without a head, or the PEFT model around it.
    """

    #: `lengths` are those of `Batcher`, the last one of what fills the stream up
    tensors = (*STREAM, "lengths")
    optional = (*FACTS, "gradient")

    def __init__(self, model: Any, pooling: Pooling, objective: Objective) -> None:
        binding = binding_of(model)
        assert binding is not None and binding.bound
        super().__init__(model, [binding])
        self.pooling, self.objective = pooling, objective

    def forward(self, batch: Mapping[str, Any], counts: tuple[Tensor, ...]) -> Vectors | Loss:
        inputs = {n: x for n, x in batch.items() if n not in (*FACTS, "gradient", "lengths")}
        part = {"inputs": inputs, "lengths": batch["lengths"], "kept": None, "filled": True}
        if "gradient" in batch:
            return Loss((forward(self.model, part, self.pooling) * batch["gradient"]).sum())
        if "places" not in batch:
            with torch.no_grad():
                return Vectors(forward(self.model, part, self.pooling))
        vectors = forward(self.model, part, self.pooling).index_select(0, batch["places"])
        facts = {name: batch.get(name) for name in FACTS} | {"rows": batch["excluded"].shape[0]}
        return Loss(self.objective(vectors, facts) / counts[0])

    def warm_up(self, device: torch.device, names: Collection[str]) -> dict[str, Any]:
        return self.nonsense(device, 256, 2, 128, names)

    def nonsense(
        self, device: torch.device, tokens: int, texts: int, longest: int, names: Collection[str]
    ) -> dict[str, Any]:
        """A batch of a shape, of nothing but the first token, for the pass that takes inputs of these names; of the
        whole batch's loss one in which half of the texts are anchors."""
        batch = nonsense_stream(device, tokens, max(texts, 2), longest)
        lengths = torch.full((texts + 1,), max(tokens // (texts + 1), 1), device=device)
        lengths[-1] = tokens - int(lengths[:-1].sum())
        batch["lengths"] = lengths
        if "gradient" in names:
            width = self.bindings[0].config.hidden_size
            batch["gradient"] = torch.zeros(texts, width, device=device)
        if "places" in names:
            rows = max(texts // 2, 1)
            candidates = texts - rows
            batch["places"] = torch.arange(texts, device=device)
            batch["excluded"] = torch.zeros(rows, candidates, dtype=torch.bool, device=device)
            batch["owners"] = torch.zeros(candidates - rows, dtype=torch.int64, device=device)
            if "scores" in names:
                batch["scores"] = torch.linspace(0, 1, rows, device=device)
        return batch


def pass_over(part: Mapping[str, Any], **more: Tensor) -> dict[str, Any]:
    """What the task takes of a part that `Batcher` made."""
    inputs = {name: value for name, value in part["inputs"].items() if name != LENGTHS}
    lengths = part["lengths"]
    if not part["filled"]:
        lengths = torch.cat([lengths, lengths.new_zeros(1)])
    return {**inputs, "lengths": lengths, **more}
