"""A step of static shape of `DualARModel`: its two losses, as `engine.TrainingStep` runs and records them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pronghorn.engine import Binding, Task, base_causal_lm, binding_of
from pronghorn.engine.forward import readable_head
from pronghorn.engine.tasks import STREAM, nonsense_stream


class SpeechOutput(NamedTuple):
    """Losses of a micro-batch as they stand in the step's, and how many most likely predictions were right."""

    loss: Tensor
    token_loss: Tensor
    code_loss: Tensor
    tokens_correct: Tensor
    codes_correct: Tensor


class SpeechTask(Task):
    """Both transformers of a model whose decoders are bound. `counts`: supervised tokens, and codes of frames.

    Args:
        model: a `DualARModel`, or the PEFT model around it.
    """

    tensors = (*STREAM, "labels", "loss_rows", "codes", "frame_rows")

    def __init__(self, model: Any, code_weight: float) -> None:
        bindings = decoders_of(model)
        assert bindings is not None
        super().__init__(model, bindings)
        self.code_weight = code_weight

    def why_another_call(self) -> str | None:
        for binding in self.bindings:
            if readable_head(binding.model, binding) is None:
                return "an lm_head runs through its own forward"
        return super().why_another_call()

    def forward(self, batch: Mapping[str, Any], counts: tuple[Tensor, ...]) -> SpeechOutput:
        tokens, codes = counts
        found = self.model(**batch, token_count=tokens, code_count=codes, code_weight=self.code_weight)
        return SpeechOutput(*(getattr(found, name) for name in SpeechOutput._fields))

    def parked(self, inputs: Mapping[str, Tensor]) -> Iterator[tuple[Binding, int]]:
        slow, fast = self.bindings
        yield slow, inputs["input_ids"].shape[-1]
        yield fast, inputs["frame_rows"].numel() * inputs["codes"].shape[1]

    def warm_up(self, device: torch.device, names: Collection[str]) -> dict[str, Any]:
        return self.nonsense(device, 256, 128, 64, 2, 128)

    def nonsense(
        self, device: torch.device, tokens: int, loss_rows: int, frames: int, documents: int, longest: int
    ) -> dict[str, Any]:
        """A batch of a shape, of nothing but the first token and the first codes."""
        books = base_causal_lm(self.model).config.num_codebooks
        batch = nonsense_stream(device, tokens, documents, longest)
        return batch | {
            "labels": torch.zeros_like(batch["input_ids"]),
            "loss_rows": torch.arange(loss_rows, device=device),
            "codes": torch.zeros(1, books, tokens, dtype=torch.int64, device=device),
            "frame_rows": torch.arange(frames, device=device),
        }


def decoders_of(model: Any) -> list[Binding] | None:
    """The bindings of the slow and the fast transformer; None where one of them is not bound."""
    base = base_causal_lm(model)
    found = [binding_of(decoder) for decoder in (base.slow, base.fast)]
    bound = [binding for binding in found if binding is not None and binding.bound]
    return bound if len(bound) == 2 else None
