"""Whether a model is still the one that was read: its modules, where their weights lie, and what these hold.

Writes that autograd sees are counted by torch, tensor by tensor. Others are not: torch's fused optimizers (the
Trainer's usual one), those of bitsandbytes and `parameter.data` count nothing. What is trained, or belongs to the
adapters that are active, is therefore looked at itself. Of large weights a part is read, everywhere in them: optimizers
write to all of a tensor, and reading 16 GB before each answer took longer than its first token (8B on an H200).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: tensors of more numbers are read in part: so many of each `EVERY` that lie together; no row as long is passed by
WHOLE, WINDOW, EVERY = 1 << 22, 16, 1 << 10


class Watch:
    """Remembers a model as it is now."""

    def __init__(self, base: nn.Module) -> None:
        # All modules but those that hold nothing and do nothing, of which PEFT puts half a dozen into every layer.
        idle = ("Identity", "Dropout", "ModuleDict", "ParameterDict", "BufferDict")
        self._modules = [
            m
            for m in base.modules()
            if m._modules or m._parameters or m._buffers or type(m).__name__ not in idle
        ]
        self._base = base
        self._seen = self._look()

    def changed(self) -> bool:
        """Whether weights were trained, moved, merged or switched, or modules replaced, since then."""
        return self._look() != self._seen

    def _look(self) -> list[Any]:
        # PEFT's virtual tokens come in by this function of the instance, and leave the class's there when they go.
        prepared = self._base.__dict__.get("prepare_inputs_for_generation")
        return [getattr(prepared, "__func__", prepared), *look_at(self._modules), *_sums(self._modules)]


def look_at(modules: Sequence[nn.Module]) -> list[Any]:
    """Everything about the modules that costs no look at their tensors' numbers.

    Taken before every answer, so modules' own dictionaries are read: nn.Module's ways through them take milliseconds.
    """
    found: list[Any] = []
    for module in modules:
        own = module.__dict__
        children = own["_modules"]
        found.extend(map(id, children.values()))
        for held in (own["_parameters"], own["_buffers"]):
            for tensor in held.values():
                if tensor is not None:
                    found.append(tensor.data_ptr())
                    # One made in inference mode counts no versions, and cannot be trained either.
                    found.append(0 if tensor.is_inference() else tensor._version)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            found.append((len(own["_forward_hooks"]), len(own["_forward_pre_hooks"]), id(own.get("forward"))))
        if "lora_A" in children:
            found.append(tuple(module.active_adapters))  # type: ignore[arg-type]
            found.append((module.disable_adapters, *module.merged_adapters, *module.scaling.values()))  # type: ignore[misc, operator]
    return found


def _sums(modules: Sequence[nn.Module]) -> list[int]:
    """Of what may be written to uncounted: a few numbers a tensor, as bits, so that one that is no number equals
    itself."""
    alike: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = defaultdict(list)
    for tensor in _written_to(modules):
        if tensor.numel():
            part = part_of(tensor.detach())
            # A list of tensors takes few launches only where all of them are whole.
            alike[part.device, part.dtype, part.is_contiguous()].append(part)
    with torch.no_grad():
        return [number for tensors in alike.values() for number in _sums_of(tensors)]


def part_of(tensor: Tensor) -> Tensor:
    """What is read of a tensor: itself, or windows of a large one."""
    if tensor.numel() <= WHOLE or not tensor.is_contiguous():
        return tensor
    rows = tensor.numel() // EVERY
    return tensor.view(-1)[: rows * EVERY].view(rows, EVERY)[:, :WINDOW]


def _sums_of(tensors: list[Tensor]) -> list[int]:
    """Of tensors of one device and dtype."""
    # On a CPU norms of 16-bit tensors in fp32 take fifty times as long. Of 64-bit numbers, an even count of changed
    # signs does not change the sum.
    if tensors[0].device.type == "cpu" and tensors[0].element_size() < 8:
        return [int(part.sum()) for tensor in tensors for part in _words(tensor)]
    return _norms_and_maxima(tensors)


def _norms_and_maxima(tensors: list[Tensor]) -> list[int]:
    """In a few launches for all tensors. A norm stays where signs change, which the largest number does not."""
    wide = None if tensors[0].dtype == torch.float64 else torch.float32
    found = torch._foreach_norm(tensors, 2, wide), torch._foreach_max(tensors)
    return [bits for of_kind in found for bits in torch.stack(of_kind).double().view(torch.int64).tolist()]


def _words(tensor: Tensor) -> list[Tensor]:
    """Its bytes, eight at a time, and those that are left."""
    flat = tensor.contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    flat = flat.view(torch.uint8)
    whole = flat.numel() // 8 * 8
    return [part for part in (flat[:whole].view(torch.int64), flat[whole:]) if part.numel()]


def _written_to(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        own = module.__dict__
        for parameter in own["_parameters"].values():
            if parameter is not None and parameter.requires_grad:
                yield parameter
        if "lora_A" not in own["_modules"]:
            continue
        for kind in ("lora_A", "lora_B"):
            pairs = own["_modules"][kind]._modules
            for name in module.active_adapters:  # type: ignore[union-attr]
                weight = getattr(pairs.get(name), "weight", None)
                if isinstance(weight, Tensor) and not weight.requires_grad:
                    yield weight
