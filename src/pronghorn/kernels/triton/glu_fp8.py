"""The gated linear unit in Triton with its output in e4m3 beside it: a whole row a program, for its largest number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.triton.fp8 import row_scale
from pronghorn.kernels.triton.glu import value_and_slope
from pronghorn.kernels.triton.launch import row_block, unit_rows


@triton.jit
def _forward(
    gate_ptr, up_ptr, act_ptr, codes_ptr, scales_ptr, gate_stride, up_stride, width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = value_and_slope(gate, ACTIVATION)
    act = (value * up).to(act_ptr.dtype.element_ty)
    tl.store(act_ptr + row * width + columns, act, mask=inside)
    rounded = act.to(tl.float32)
    scale = row_scale(rounded)
    tl.store(scales_ptr + row, scale)
    tl.store(codes_ptr + row * width + columns, (rounded / scale).to(tl.float8e4nv), mask=inside)


def forward(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    gate, up = unit_rows(gate), unit_rows(up)
    rows, width = gate.shape
    act = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=gate.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=gate.device)
    if act.numel():
        block, warps = row_block(width)
        _forward[(rows,)](
            gate, up, act, codes, scales, gate.stride(0), up.stride(0), width,
            ACTIVATION=activation, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return act, (codes, scales)
