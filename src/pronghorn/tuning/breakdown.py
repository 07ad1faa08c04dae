"""A step's peak memory, split by what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pronghorn.blocks import Level, saved_bytes_per_token
from pronghorn.blocks.levels import space_of
from pronghorn.kernels.linear_cross_entropy import default_chunk_rows
from pronghorn.memory import Batch, Estimate, ModelShape

#: A process's CUDA context and loaded kernels, outside of what torch reserves: an assumption, about right since 2024.
CONTEXT_BYTES = 500 * 2**20


@dataclass(frozen=True)
class Part:
    """Bytes of one cause, and a few words about it."""

    name: str
    size: int
    about: str


def parts_of(shape: ModelShape, levels: Sequence[Level], batch: Batch, found: Estimate) -> tuple[Part, ...]:
    """Parts that add up to what torch reserves at the peak, and the CUDA context beside it."""
    adapters = shape.adapter_parameters if shape.trained == "adapters" else 0
    trained = adapters or shape.parameters
    copied = shape.copied_adapter_parameters if adapters else 0
    own = adapters * 4 + copied * shape.element
    gradients = trained * (4 if adapters else shape.element)
    states = 2 * trained * (shape.state_element if adapters else shape.element)
    libraries = max(found.fixed - found.weights - own - gradients - states, 0)
    moment = max(found.moments, key=lambda name: found.moments[name])
    above = found.allocated - found.fixed
    kept = min(sum(saved_bytes_per_token(level, shape.widths) for level in levels) * batch.tokens, above)
    chunk = default_chunk_rows(shape.vocabulary, shape.element, "cuda", space_of(levels, None))
    logits = min(chunk, batch.loss_rows) * shape.vocabulary * shape.element
    if moment == "loss":
        logits = min(logits, above - kept)
        about = "a chunk of them at a time"
    else:
        about = f"{logits / 2**20:.0f} MiB a chunk, gone before the peak, which is in {moment}"
        logits = 0
    about_adapters = "none"
    if adapters:
        about_adapters = "fp32, and a copy in 16 bits" if copied else "fp32"
    return (
        Part("weights", found.weights, shape.storage),
        Part("adapters", own, about_adapters),
        Part("gradients", gradients, f"of {trained / 1e6:.1f} million trained weights"),
        Part("optimizer", states, "AdamW's two states"),
        Part("activations", kept, "what the save levels keep on the GPU"),
        Part("logits", logits, about),
        Part("working tensors", above - kept - logits, f"of the widest moment, in {moment}"),
        Part("libraries", libraries, "workspaces of matrix products"),
        Part(
            "fragmentation", found.reserved - found.allocated, "reserved by torch and not in use at the peak"
        ),
        Part("CUDA context", CONTEXT_BYTES, "outside of torch; assumed"),
    )
