"""Whether a model is still the one that was read: its modules, where their weights lie, and what these hold.

Writes that autograd sees are counted by torch, tensor by tensor. Others are not: torch's fused optimizers (the
Trainer's usual one), those of bitsandbytes and `parameter.data` count nothing. What is trained, or belongs to the
adapters that are active, is therefore looked at itself. Of large weights a part is read, everywhere in them: optimizers
write to all of a tensor, and reading 16 GB before each answer took longer than its first token (8B on an H200). On a
GPU one launch reads all of them (0.25 GB there), while the host looks at the modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.kernels.bit_sums import RUN, Pieces, bit_sums, words_of
from pronghorn.kernels.dispatch import use_triton

#: tensors of more numbers are read in part: so many of each `EVERY` that lie together; no row as long is passed by
WHOLE, WINDOW, EVERY = 1 << 20, 16, 1 << 10


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
        self._looked = self._look()
        self._written = Written(list(_written_to(self._modules)))
        self._numbers = self._written.numbers()()

    def changed(self) -> bool:
        """Whether weights were trained, moved, merged or switched, or modules replaced, since then."""
        numbers = self._written.numbers()
        # What is written to follows from what is looked at.
        return self._look() != self._looked or numbers() != self._numbers

    def _look(self) -> list[Any]:
        # PEFT's virtual tokens come in by this function of the instance, and leave the class's there when they go.
        prepared = self._base.__dict__.get("prepare_inputs_for_generation")
        return [getattr(prepared, "__func__", prepared), *look_at(self._modules)]


def look_at(modules: Sequence[nn.Module]) -> list[Any]:
    """Everything about the modules that costs no look at their tensors' numbers.

    Taken before every answer, so modules' own dictionaries are read: nn.Module's ways through them take milliseconds.
    """
    found: list[Any] = []
    tensors: list[Tensor | None] = []
    for module in modules:
        own = module.__dict__
        children = own["_modules"]
        if children:
            found += children.values()
            if type(module) is nn.ModuleDict:  # which does nothing itself
                continue
            if "lora_A" in children:
                found.append(tuple(module.active_adapters))  # type: ignore[arg-type]
                found.append((module.disable_adapters, *module.merged_adapters, *module.scaling.values()))  # type: ignore[misc, operator]
        if own["_parameters"]:
            tensors += own["_parameters"].values()
        if own["_buffers"]:
            tensors += own["_buffers"].values()
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            found.append((len(own["_forward_hooks"]), len(own["_forward_pre_hooks"]), id(own.get("forward"))))
    there = [tensor for tensor in tensors if tensor is not None]
    found += map(Tensor.data_ptr, there)
    # One made in inference mode counts no versions, and cannot be trained either.
    found += [0 if tensor.is_inference() else tensor._version for tensor in there]
    found += [tensor.requires_grad for tensor in there]
    return found


class Written:
    """Numbers of tensors that may be written to uncounted: they are others afterwards. The tensors are kept, so that
    what is read is still theirs when the model has let go of them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        #: those that no launch reads together
        self._one_by_one: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = defaultdict(list)
        together: dict[torch.device, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            if not tensor.numel():
                continue
            if (
                tensor.is_cuda
                and words_of(tensor) is not None
                and use_triton(tensor.new_empty(0, dtype=torch.int32), None)
            ):
                together[tensor.device].append(tensor)
                continue
            part = part_of(tensor.detach())
            # A list of tensors takes few launches only where all of them are whole.
            self._one_by_one[part.device, part.dtype, part.is_contiguous()].append(part)
        self._at_once = [_AtOnce(alike) for alike in together.values()]

    def numbers(self) -> Callable[[], list[Any]]:
        """Begin to read; what is called then waits and gives the numbers."""
        for tensors in self._at_once:
            tensors.begin()

        def found() -> list[Any]:
            with torch.no_grad():
                others = [number for tensors in self._one_by_one.values() for number in _sums_of(tensors)]
            return [*others, *(tensors.wait() for tensors in self._at_once)]

        return found


class _AtOnce:
    """Tensors of one GPU, read in one launch."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        words = [flat for flat in map(words_of, tensors) if flat is not None]
        self._pieces = pieces = Pieces(words, list(map(_stride, tensors)))
        self._places, self._there = [flat.data_ptr() for flat in words], True
        self._sums = torch.empty(len(pieces.plan), dtype=torch.int64, device=pieces.table.device)
        on_gpu = self._sums.is_cuda
        self._told = torch.empty(self._sums.shape, dtype=torch.int64, pin_memory=on_gpu)
        self._ready = torch.cuda.Event() if on_gpu else None

    def begin(self) -> None:
        # Storages may have been given back or moved, for all that somebody holds them.
        self._there = [flat.data_ptr() for flat in self._pieces.words] == self._places
        if not self._there:
            return
        self._told.copy_(bit_sums(self._pieces, self._sums), non_blocking=True)
        if self._ready is not None:
            self._ready.record(torch.cuda.current_stream(self._sums.device))

    def wait(self) -> bytes | None:
        if not self._there:
            return None
        if self._ready is not None:
            self._ready.synchronize()
        return self._told.numpy().tobytes()


def _stride(tensor: Tensor) -> int:
    """Words from one run that is read to the next."""
    return RUN if tensor.numel() <= WHOLE else EVERY * tensor.element_size() // 4


def part_of(tensor: Tensor) -> Tensor:
    """What is read of a tensor: itself, or windows of a large one."""
    if tensor.numel() <= WHOLE or not tensor.is_contiguous():
        return tensor
    rows = tensor.numel() // EVERY
    return tensor.view(-1)[: rows * EVERY].view(rows, EVERY)[:, :WINDOW]


def _sums_of(tensors: list[Tensor]) -> list[int]:
    """Of tensors of one device and dtype a few numbers each, as bits, so that one that is no number equals itself."""
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
