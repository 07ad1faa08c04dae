"""Out of memory: what was planned for the largest batch, what was there, and the smallest change that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from pronghorn.engine import binding_of
from pronghorn.engine.planning import shape_of
from pronghorn.errors import OutOfMemory
from pronghorn.hardware import GpuMemory, gpu_memory
from pronghorn.memory import Batch, ModelShape, estimate
from pronghorn.training.memory import largest_batch, planned_reserved

_GIB = 2**30
#: What others on the GPU may take without being named as the reason: a context and a desktop.
_OTHERS = _GIB // 2
#: Reserved beyond the plan that counts as a deviation.
_TOLERATED = 1.05


def shortage(trainer: Any, failure: str, memory: GpuMemory | None = None) -> OutOfMemory:
    """The error for a run whose memory ran out.

    Args:
        trainer: a `pronghorn.SFTTrainer`.
        failure: the first line of torch's error.
        memory: what the GPU held then; None: what it holds now.
    """
    if memory is None:
        if trainer.args.device.type != "cuda":
            return OutOfMemory(f"memory ran out: {failure}", fix=_GENERAL)
        memory = gpu_memory(trainer.args.device)
    had = (
        f"this process had {memory.reserved / _GIB:.2f} of the GPU's {memory.total / _GIB:.2f} GiB, others "
        f"{memory.others / _GIB:.2f}, {memory.free / _GIB:.2f} were free"
    )
    if memory.allowed is not None:
        had += f", torch may have {memory.allowed / _GIB:.2f} here (set_per_process_memory_fraction)"
    binding, batch = binding_of(trainer.model), largest_batch(trainer)
    if binding is None or not binding.bound or batch is None:
        return OutOfMemory(f"memory ran out ({failure}): {had}", fix=_advice(memory, None, None))
    capability = (9, 0)
    if trainer.args.device.type == "cuda":
        capability = torch.cuda.get_device_capability(trainer.args.device)
    shape, levels = shape_of(binding), binding.save_levels
    planned = planned_reserved(binding, batch, capability)
    fitting = next(_fitting(shape, batch, memory.within_reach, capability), None)
    return OutOfMemory(
        f"memory ran out ({failure}): {planned / _GIB:.2f} GiB were to be expected for the largest batch of "
        f"{batch.tokens:,} tokens at the save levels {', '.join(sorted(set(levels)))}; {had}",
        fix=_advice(memory, planned, fitting),
    )


_GENERAL = (
    "memory_budget='auto' (layers keep what fits), use_gradient_checkpointing='offload', load_in_4bit, or a smaller "
    "per_device_train_batch_size or max_length"
)


def _advice(memory: GpuMemory, planned: int | None, fitting: str | None) -> str:
    """What helps most, by what differs from the plan."""
    said = []
    if memory.others > _OTHERS:
        said.append(f"end what else uses the GPU ({memory.others / _GIB:.2f} GiB; nvidia-smi lists it)")
    if planned is not None and planned <= memory.within_reach:
        if memory.reserved > _TOLERATED * planned:
            said.append(
                "more was reserved than a step needs: let go of tensors that callbacks, compute_metrics or the "
                "script keep on the GPU, and set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
            )
        else:
            said.append("set memory_budget='auto', which rehearses the largest batch before training")
    if planned is None or planned > memory.within_reach:
        said.append(fitting or _GENERAL)
    return "; or ".join(said)


def _fitting(shape: ModelShape, batch: Batch, limit: int, capability: tuple[int, int]) -> Iterator[str]:
    """Changes that make the largest batch fit, the least one first, with what each would take."""

    def size(level: str, tokens: int = batch.tokens, of: ModelShape = shape) -> int:
        smaller = replace(batch, tokens=tokens, loss_rows=min(batch.loss_rows, tokens))
        return estimate(of, level, smaller, capability=capability).reserved

    for level in ("attention", "none", "offload"):
        if size(level) <= limit:
            yield f"use_gradient_checkpointing='{level}' takes {size(level) / _GIB:.2f} GiB"
    for part in (2, 4, 8, 16):
        tokens = batch.tokens // part
        if tokens >= 128 and size("offload", tokens) <= limit:
            gib = size("offload", tokens) / _GIB
            yield (
                f"1/{part} of per_device_train_batch_size or max_length, with use_gradient_checkpointing='offload', "
                f"takes {gib:.2f} GiB"
            )
    if shape.trained == "adapters" and shape.storage in ("bfloat16", "float16"):
        small = replace(shape, storage="nf4")
        taken = size("offload", of=small)
        if taken <= limit:
            yield f"load_in_4bit with use_gradient_checkpointing='offload' takes {taken / _GIB:.2f} GiB"
