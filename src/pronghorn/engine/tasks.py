"""What a step of static shape computes: the loss of a causal LM here; other kinds of models have tasks of their own.

A task says which batches it takes and runs a model on them up to the loss. `engine.step` does the rest: gradients and
their buffers, graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pronghorn.engine.altered import altered_part
from pronghorn.engine.bind import binding_of
from pronghorn.engine.binding import Binding
from pronghorn.engine.forward import readable_head
from pronghorn.engine.towers import embedded, embedded_nonsense, loss_of_embedded

#: Tensors that describe a packed stream, and its numbers: one makes a batch's shape, the other is not needed for it.
STREAM = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
NUMBERS, LENGTHS = ("max_length_q", "max_length_k"), "document_lengths"
#: What batches with images have besides.
IMAGES = (
    "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "token_type_ids",
)  # fmt: skip
#: Attention implementations that ask the host for nothing but the longest document.
CAPTURABLE = ("flash", "cudnn", "flex")


class StepOutput(NamedTuple):
    """The micro-batch's loss (0-dim fp32) and the number of right predictions (0-dim int64), both the caller's."""

    loss: Tensor
    num_correct: Tensor


class Task(ABC):
    """What a step computes of a batch.

    Args:
        model: what is trained; its parameters get the gradients.
        bindings: of the decoders in it.
    """

    #: a batch's tensors, all of them needed, which a graph reads from places of its own
    tensors: Sequence[str]
    #: what a batch may hold besides
    optional: Sequence[str] = ()

    def __init__(self, model: Any, bindings: Sequence[Binding]) -> None:
        self.model, self.bindings = model, tuple(bindings)

    def why_another_call(self) -> str | None:
        """Why the model's forward is not the blocks', or None."""
        parts = ((b.decoder, b.family.parts, b.family.mixture) for b in self.bindings)
        return next(filter(None, (altered_part(*part) for part in parts)), None)

    def why_another_batch(self, batch: Mapping[str, Any]) -> str | None:
        """Why a batch is not one packed stream of what this task takes, or None."""
        unknown = sorted(set(batch) - {*self.tensors, *NUMBERS, LENGTHS, *self.optional})
        missing = [name for name in (*self.tensors, "max_length_q") if name not in batch]
        if not unknown and not missing:
            return None
        named = "has " + ", ".join(unknown) if unknown else "lacks " + ", ".join(missing)
        return f"the batch {named}: a step of static shape takes one packed stream of tokens"

    def why_eager(self, batch: Mapping[str, Any]) -> str | None:
        """Why a batch of this kind cannot be recorded, or None."""
        return None

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What a graph reads of a batch, by name; computed outside of it where shapes change from batch to batch.

        Tensors that require a gradient get theirs handed back.
        """
        return {name: batch[name] for name in (*self.tensors, *self.optional) if name in batch}

    @abstractmethod
    def forward(self, batch: Mapping[str, Any], counts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A named tuple of tensors for a batch, or for what `inputs` made of it; the one called `loss`, where there is
        one, is differentiated.

        Args:
            counts: what sums of losses are divided by, 0-dim.
        """

    def parked(self, inputs: Mapping[str, Tensor]) -> Iterator[tuple[Binding, int]]:
        """The tokens that each decoder sees of such inputs."""
        yield self.bindings[0], inputs["position_ids"].shape[-1]

    @abstractmethod
    def warm_up(self, device: torch.device, names: Collection[str]) -> dict[str, Any]:
        """A small batch that compiles and loads every kernel before the first capture.

        Args:
            names: of the inputs that will be recorded.
        """


class LanguageTask(Task):
    """Cross-entropy of a causal LM, one that reads images included."""

    tensors = (*STREAM, "labels", "loss_rows")
    optional = IMAGES

    def __init__(self, model: Any) -> None:
        binding = binding_of(model)
        assert binding is not None and binding.bound
        super().__init__(model, [binding])
        self.binding = binding

    def why_another_call(self) -> str | None:
        binding, altered = self.binding, super().why_another_call()
        if altered is not None:
            return altered
        if "_loss_function" in binding.model.__dict__ or readable_head(binding.model, binding) is None:
            return "lm_head or the loss runs through its own forward"
        return None

    def why_eager(self, batch: Mapping[str, Any]) -> str | None:
        binding = self.binding
        if not _has_images(batch):
            return None
        stock = binding.why_stock(binding.decoder, None, None, False, {})
        if stock is not None:
            return stock
        if binding.family.mixture is not None and getattr(binding.config, "output_router_logits", False):
            return "batches with images and the balance of experts: the balance is added to the whole model's loss"
        if binding.family.image_blocks:
            dtype = binding.weight_dtype or binding.model.get_input_embeddings().weight.dtype
            for window in binding.windowed():
                device = batch["labels"].device
                backend = binding.attention_backend(
                    device, dtype, binding.head_dim, window=window, both_ways=True
                )
                if backend not in CAPTURABLE:
                    return f"attention over images runs as '{backend}', document by document"
        return None

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if "inputs_embeds" in batch:  # a rehearsal's
            return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        if not _has_images(batch):
            return super().inputs(batch)
        images = {name: batch[name] for name in (*IMAGES, *NUMBERS) if name in batch}
        return embedded(self.binding, super().inputs(batch), images)

    def forward(self, batch: Mapping[str, Any], counts: tuple[Tensor, ...]) -> StepOutput:
        if "inputs_embeds" in batch:
            return StepOutput(*loss_of_embedded(self.binding, batch, counts[0]))
        output = self.model(**batch, num_items_in_batch=counts[0], use_cache=False)
        return StepOutput(output.loss, output.num_correct)

    def warm_up(self, device: torch.device, names: Collection[str]) -> dict[str, Any]:
        return self.nonsense(device, 256, 128, 2, 128, images="inputs_embeds" in names)

    def nonsense(
        self,
        device: torch.device,
        tokens: int,
        loss_rows: int,
        documents: int,
        longest: int,
        *,
        images: bool = False,
    ) -> dict[str, Any]:
        """A batch of a shape, of nothing but the first token; with `images` of embeddings for the decoder alone."""
        batch = nonsense_stream(device, tokens, documents, longest)
        batch["labels"] = torch.zeros_like(batch["input_ids"])
        batch["loss_rows"] = torch.arange(loss_rows, device=device)
        return embedded_nonsense(self.binding, batch) if images else batch


def nonsense_stream(device: torch.device, tokens: int, documents: int, longest: int) -> dict[str, Any]:
    """A packed stream of nothing but the first token, in documents of `longest` tokens; at least as many as fill it."""
    documents = max(documents, -(-tokens // longest))
    bounds = torch.arange(documents + 1, device=device).mul_(longest).clamp_(max=tokens).to(torch.int32)
    return {
        "input_ids": torch.zeros(1, tokens, dtype=torch.int64, device=device),
        "position_ids": torch.arange(tokens, device=device)[None] % longest,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        LENGTHS: tuple(max(min(longest, tokens - longest * i), 0) for i in range(documents)),
    }


def _has_images(batch: Mapping[str, Any]) -> bool:
    return any(name in batch for name in (*IMAGES, "inputs_embeds"))
