"""From a linear module to its stored weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from pronghorn.kernels.fp8 import E4M3
from pronghorn.weights.base import DenseWeight, Weight
from pronghorn.weights.dequantised import StoredLinear
from pronghorn.weights.four_bit import four_bit_weight
from pronghorn.weights.fp8 import Fp8GradWeight
from pronghorn.weights.fp8_linear import FP8_SCALES, FP8_TRANSPOSED
from pronghorn.weights.quantised import BitsAndBytesInt8Weight


def read_weight(module: nn.Module) -> Weight | None:
    """The weight of a plain, fp8, int8 or bitsandbytes linear module, or None for a module of another kind.

    Classes are recognised by name so that bitsandbytes is imported only by those who load with it.
    """
    kind = type(module).__name__
    if kind in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return _read_four_bit(module)
    if kind == "Linear8bitLt":
        return _read_eight_bit(module)
    if isinstance(module, StoredLinear):
        return module.stored()
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return _read_dense(module)
    return None


def keep_four_bit_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights when a model answers on a CPU with AVX512-BF16.

    The repacking rounds every scale to bf16 and does not come back to the same weights, so a model would train and
    merge differently after its first answer; PEFT's DoRA also misreads repacked weights.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _read_dense(module: nn.Linear) -> Weight:
    buffers = module._buffers
    codes, scales = buffers.get(FP8_TRANSPOSED), buffers.get(FP8_SCALES)
    if scales is None or module.weight.requires_grad:
        return DenseWeight(module.weight)
    return Fp8GradWeight(module.weight, scales, None if codes is None else codes.view(E4M3))


def _read_four_bit(module: Any) -> Weight | None:
    state = getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:  # not quantised yet: bitsandbytes quantises when the module moves to its device
        return None
    if getattr(state, "packing_format_for_cpu", False):
        _restore_layout(module, state)
    return four_bit_weight(module)


def _restore_layout(module: Any, state: Any) -> None:
    """Undo a repacking that came before `keep_four_bit_layout`; scales stay rounded to bf16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
        module.weight.data, state
    )


def _read_eight_bit(module: Any) -> Weight | None:
    weight, state = module.weight, module.state
    codes = state.CB if state.CB is not None else weight.CB
    row_absmax = state.SCB if state.SCB is not None else weight.SCB
    if codes is None or row_absmax is None:
        return None
    return BitsAndBytesInt8Weight(codes, row_absmax)
