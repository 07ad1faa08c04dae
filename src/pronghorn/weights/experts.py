"""The stacked weights of a layer's experts in whatever form they are stored."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from pronghorn.kernels.nf4 import FourBits, dequantize_4bit
from pronghorn.weights.quantised import FourBitWeight


class ExpertWeight:
    """One projection of all experts: W [E, out, in], or [E, in, out] where `transposed`."""

    #: experts, out, in
    shape: tuple[int, int, int]
    transposed: bool = False
    #: the tensor that receives dW, or None for frozen weights
    parameter: Tensor | None = None
    #: as `Weight.storage` and `Weight.label`
    storage: str = "dense"
    label: str = "exact"

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The stack in `dtype`. May alias the stored tensor: never write to it."""
        raise NotImplementedError

    def _sizes(self, stored: tuple[int, ...]) -> tuple[int, int, int]:
        experts, rows, columns = stored
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)


class DenseExperts(ExpertWeight):
    """Experts stored as they are used: bf16, fp16, fp32 or fp64."""

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        self.weight, self.transposed = weight, transposed
        self.shape = self._sizes(tuple(weight.shape))
        self.parameter = weight if weight.requires_grad else None
        self.storage = str(weight.dtype).removeprefix("torch.")

    def dense(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight.detach()
        return weight if weight.dtype == dtype else weight.to(dtype)


class FourBitExperts(ExpertWeight):
    """Experts in bitsandbytes' NF4 or FP4, the whole stack as one list of blocks; dequantised for each product."""

    label = "quantised"

    def __init__(self, packed: Tensor, state: Any, transposed: bool) -> None:
        self.packed = FourBitWeight(packed, state)
        # As one matrix, the experts below each other.
        self.packed.shape = (state.shape[0] * state.shape[1], state.shape[2])
        self.transposed, self.storage = transposed, self.packed.storage
        self.shape = self._sizes(tuple(state.shape))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.packed.dense(dtype).view(self.packed.state.shape)

    @property
    def has_whole_blocks(self) -> bool:
        """Whether every expert's matrix is made of blocks of its own."""
        return self._size % self.packed.state.blocksize == 0

    def dense_of(self, experts: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrices of experts [S] (int64, on the stack's device), [S, ...] as `dense` has them. Asks nothing of
        the device; of a stack that `has_whole_blocks`."""
        bits, (count, *sides) = self.packed.bits, self.packed.state.shape
        blocks = self._size // bits.blocksize
        packed = bits.packed.view(count, -1).index_select(0, experts)
        scales = bits.absmax.view(count, blocks).index_select(0, experts)
        if bits.nested is not None:
            code2, absmax2, offset, blocksize2 = bits.nested
            numbers = experts[:, None] * blocks + torch.arange(blocks, device=experts.device)
            scales = code2[scales.int()] * absmax2[numbers // blocksize2] + offset
        chosen = FourBits(
            packed, scales.view(-1), bits.code, bits.blocksize, (len(experts) * sides[0], sides[1])
        )
        return dequantize_4bit(chosen, dtype).view(len(experts), *sides)

    @property
    def _size(self) -> int:
        """Elements of one expert's matrix."""
        _, rows, columns = self.packed.state.shape
        return int(rows * columns)


def read_experts(module: nn.Module, name: str, transposed: bool) -> ExpertWeight:
    """The stack `name` of a module of experts, plain or held in 4 bits."""
    if name in four_bit_states(module):
        return held_stack(module, name, transposed)
    return DenseExperts(getattr(module, name), transposed)


# --- stacks held in 4 bits -----------------------------------------------------------------------------------------


def four_bit_states(module: nn.Module) -> dict[str, Any]:
    """bitsandbytes' `QuantState` of each stack that a module holds in 4 bits."""
    return module.__dict__.get("four_bit_states", {})


def hold_in_four_bits(module: nn.Module, name: str, quant_type: str, double_quant: bool) -> None:
    """Replace a stacked parameter by its 4-bit codes, on its device.

    In the parameter's place stays a buffer of its shape that holds nothing, by which PEFT knows the sizes; the module's
    own forward finds the dequantised stack instead (`_dequantised_forward`). bitsandbytes' parametrisation of
    parameters would do the same, but PEFT stacks its own on it and does not find it again.
    """
    from bitsandbytes.functional import quantize_4bit

    parameter = module._parameters[name]
    assert parameter is not None
    packed, state = quantize_4bit(parameter.data, quant_type=quant_type, compress_statistics=double_quant)
    hold_packed(module, name, packed, state)


def hold_packed(module: nn.Module, name: str, packed: Tensor, state: Any) -> None:
    """Replace a stacked parameter by codes of it and their `QuantState`, as `hold_in_four_bits` does."""
    del module._parameters[name]
    module.register_buffer(f"{name}_packed", packed)
    module.register_buffer(name, empty_stack(state, packed.device), persistent=False)
    module.__dict__.setdefault("four_bit_states", {})[name] = state
    if not runs_its_own_forward(module):
        module.forward = partial(_dequantised_forward, module)
        module.register_state_dict_post_hook(_without_empty_stacks)


def empty_stack(state: Any, device: torch.device) -> Tensor:
    """Zeros of a stack's shape that take the room of one."""
    return torch.zeros((), dtype=state.dtype, device=device).expand(state.shape)


def runs_its_own_forward(module: nn.Module) -> bool:
    """Whether the forward on a module's instance is the one that `hold_in_four_bits` put there."""
    return getattr(module.__dict__.get("forward"), "func", None) is _dequantised_forward


def _without_empty_stacks(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """PEFT's parametrisation puts the buffers back as ones that are saved."""
    for name in four_bit_states(module):
        state_dict.pop(f"{prefix}{name}", None)


def held_stack(module: nn.Module, name: str, transposed: bool = False) -> FourBitExperts:
    """The stack that a module holds in 4 bits, wherever the module has moved to."""
    packed: Tensor = module._buffers[f"{name}_packed"]  # type: ignore[assignment]
    state, empty = four_bit_states(module)[name], module._buffers.get(name)
    if state.absmax.device != packed.device:
        state.to(packed.device)
    if empty is not None and empty.untyped_storage().nbytes() > empty.element_size():
        # Moving or casting the module has given every element of the empty stack a place of its own.
        module._buffers[name] = empty_stack(state, packed.device)
    return FourBitExperts(packed, state, transposed)


def _dequantised_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The class's forward on dequantised stacks, with what PEFT adds to the empty ones meanwhile."""
    kind = type_before_parametrizations(module)
    twin = kind.__new__(kind)
    twin.__dict__ = {
        **module.__dict__,
        "_parameters": dict(module._parameters),
        "_modules": {},
        "_buffers": {},
    }
    twin.__dict__.pop("forward")
    added = module._modules.get("parametrizations")
    twin._modules.update({n: m for n, m in module._modules.items() if m is not added})
    for name, state in four_bit_states(module).items():
        stack = held_stack(module, name).dense(state.dtype)
        if added is not None and name in added:  # type: ignore[operator]
            stack = stack + getattr(module, name)
        twin._buffers[name] = stack
    return kind.forward(twin, *args, **kwargs)
