"""Kernels that work on quantised numbers, on this machine: 4-bit weights, and rows, weights and products in 8 bits.

What is compared with is decoded value by value; codes have to lie within half a step of the numbers they stand for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pronghorn.diagnostics.checks import NotHere, Unsound
from pronghorn.diagnostics.compare import Comparison, close, device, draw, dtypes
from pronghorn.diagnostics.kernel_checks import EPS, TOKENS, WIDTH, angles, said
from pronghorn.hardware import probe
from pronghorn.kernels import fp8 as fp8_kernels
from pronghorn.kernels import glu as glu_kernels
from pronghorn.kernels import int8 as int8_kernels
from pronghorn.kernels import nf4 as nf4_kernels
from pronghorn.kernels import qkv_grads as joined_kernels
from pronghorn.kernels import rms_norm as norm_kernels
from pronghorn.kernels.four_bit_int8 import four_bit_to_int8
from pronghorn.kernels.lora import LowRank
from pronghorn.kernels.nf4 import FourBits

#: NF4's sixteen numbers (Dettmers et al. 2023, appendix E)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def four_bit_case() -> tuple[FourBits, Tensor]:
    """A doubly quantised weight [64, 192], and the same in fp64, decoded value by value."""
    shape, blocksize, blocksize2 = (64, 192), 64, 256
    generator = torch.Generator().manual_seed(4)
    count = shape[0] * shape[1]
    packed = torch.randint(0, 256, (count // 2,), generator=generator, dtype=torch.uint8)
    scale_codes = torch.randint(0, 256, (count // blocksize,), generator=generator, dtype=torch.uint8)
    code2 = torch.linspace(-1, 1, 256)
    absmax2, offset = torch.rand(1, generator=generator) * 0.01 + 0.01, torch.tensor(0.05)
    absmax = code2[scale_codes.int()].double() * absmax2.double() + offset.double()
    nibbles = torch.stack([packed >> 4, packed & 15], 1).flatten().int()
    truth = torch.tensor(NF4, dtype=torch.float64)[nibbles].view(-1, blocksize) * absmax[:, None]
    here = device()
    nested = code2.to(here), absmax2.to(here), offset.to(here), blocksize2
    code = torch.tensor(NF4, device=here)
    bits = FourBits(packed.to(here), scale_codes.to(here), code, blocksize, shape, nested)
    return bits, truth.view(shape).to(here)


def four_bit() -> str:
    compared = Comparison()
    bits, truth = four_bit_case()
    for dtype in dtypes():
        compared.near("weight", nf4_kernels.dequantize_4bit(bits, dtype), truth)
    return said(compared)


def _needs_fp8() -> None:
    fact = probe().fp8
    if fact.value is None:
        raise NotHere(fact.reason)


def _codes_near(name: str, rows: tuple[Tensor, Tensor], wanted: Tensor) -> None:
    """Codes within half a step of e4m3: 1/16 of the number, or 2⁻¹⁰ scales where that is more."""
    codes, scales = rows
    error = (codes.double() * scales.double() - wanted.double()).abs()
    bound = torch.maximum(wanted.double().abs() / 16, scales.double() * 2.0**-10) * 1.001
    if not bool((error <= bound).all()):
        raise Unsound(f"e4m3 codes of {name} are further from the numbers than half a step")


def _powers_of_two(size: int) -> Tensor:
    """Factors of columns as the scales of a weight's rows are, fp32 [size]."""
    return torch.ldexp(torch.ones(size), torch.arange(size) % 9 - 4).to(device())


def fp8_rows() -> str:
    """Rows made into e4m3 codes, alone and by the kernels that make the rows."""
    _needs_fp8()
    compared = Comparison()
    for dtype in dtypes():
        x, other = draw(TOKENS, WIDTH, dtype=dtype), draw(TOKENS, 64, dtype=dtype)
        columns = _powers_of_two(WIDTH + 64)
        _codes_near("rows", fp8_kernels.quantise_rows(x), x)
        _codes_near("rows of one scale", fp8_kernels.quantise_tensor(x), x)
        joined = torch.cat([x, other], 1).float() * columns
        _codes_near("joined rows", fp8_kernels.quantise_joined([x, other], columns), joined)
        act, rows = fp8_kernels.glu_forward_fp8(x, x.flip(0).contiguous(), "silu")
        _codes_near("the gated unit", rows, act)
        compared.near("act", act, F.silu(x.double()) * x.flip(0).double())
        weight = draw(WIDTH, dtype=dtype, seed=5)
        y, _, _, rows = norm_kernels.rms_norm_forward_fp8(x, weight, EPS)
        _codes_near("the norm", rows, y)
        wide = x.double()
        truth = wide * (wide.square().mean(1, keepdim=True) + EPS).rsqrt() * weight.double()
        compared.near("y", y, truth)
        _gradients_with_codes(compared, x, weight)
        row_max = torch.zeros(TOKENS, dtype=torch.float32, device=device())
        act = glu_kernels.glu_forward(x, x.flip(0).contiguous(), "silu", row_max=row_max)
        if not torch.equal(row_max, act.abs().amax(1).float()):
            raise Unsound("the gated unit's row maxima are not those of its rows")
    return f"{said(compared)}; codes within half a step"


def _gradients_with_codes(compared: Comparison, x: Tensor, weight: Tensor) -> None:
    """The norm's backward and the rotation's, each with the codes of what it gives."""
    dy, columns = draw(*x.shape, dtype=x.dtype, seed=9), fp8_kernels.exponents_of(_powers_of_two(x.shape[1]))
    dx, _ = norm_kernels.rms_norm_backward(dy, x, weight, None, eps=EPS)
    again, _, rows = norm_kernels.rms_norm_backward_fp8(dy, x, weight, None, columns, eps=EPS)
    compared.near("dx", again, dx.double(), slack=2.0)
    _codes_near("the norm's gradient", rows, torch.ldexp(again.float(), columns))
    dim = 64
    cos, sin = angles(dim, x.dtype)
    dq, dk, dv = (draw(TOKENS, heads, dim, dtype=x.dtype, seed=i) for i, heads in enumerate((4, 2, 2)))
    exponents = fp8_kernels.exponents_of(_powers_of_two(8 * dim))
    parts, rows = joined_kernels.unrotate_joined_fp8(dq, dk, dv, cos, sin, exponents)
    plain = joined_kernels.unrotate_joined(dq, dk, dv, cos, sin)
    compared.near("dQ, dK, dV", torch.cat([*parts], 1), torch.cat([*plain], 1).double())
    _codes_near("joined gradients", rows, torch.ldexp(torch.cat([*parts], 1).float(), exponents))


def fp8_weights() -> str:
    """Codes of weights, turned round, made again after a change, and from 4 bits."""
    _needs_fp8()
    compared = Comparison()
    weight = draw(96, 160, dtype=dtypes()[0])
    codes, scales = fp8_kernels.quantise_weight(weight)
    _codes_near("a weight", (codes, scales), weight)
    turned = fp8_kernels.transpose_codes(codes)
    if not torch.equal(turned.view(torch.uint8), codes.view(torch.uint8).t()):
        raise Unsound("turned codes are other codes")
    again = fp8_kernels.quantise_transposed(weight, scales)
    _codes_near("a turned weight", (again.t(), scales), weight)
    bits, truth = four_bit_case()
    row_scales = fp8_kernels.four_bit_row_scales(bits)
    assert row_scales is not None
    for transposed in (False, True):
        made = fp8_kernels.four_bit_to_fp8(bits, row_scales, transposed=transposed)
        _codes_near("a 4-bit weight", (made.t() if transposed else made, row_scales), truth)
    compared.near(
        "dequantised", fp8_kernels.dequantise(codes, scales, torch.bfloat16), codes.double() * scales
    )
    return f"{said(compared)}; codes within half a step"


def _needs_int8() -> None:
    if probe().is_cuda and probe().capability < (7, 5):
        raise NotHere("int8 matrices are multiplied from compute capability 7.5 on")


def _int8_near(name: str, rows: tuple[Tensor, Tensor], exact: Tensor, allowed: float = 0.501) -> None:
    """Codes within half a scale, and what turning in 32 bits leaves."""
    off = (rows[0].double() * rows[1].double() - exact.double()).abs() / rows[1].double()
    if not float(off.max()) <= allowed:
        raise Unsound(
            f"int8 codes of {name} are {float(off.max()):.2f} scales from the numbers, allowed {allowed:.2g}"
        )


def int8_rows() -> str:
    """Rows turned and made into codes, alone and by the kernels that make the rows."""
    _needs_int8()
    compared, width = Comparison(), 320
    dtype = dtypes()[-1]
    x, dy = (draw(TOKENS, width, dtype=dtype, seed=i) for i in range(2))
    weight = draw(width, dtype=dtype, seed=5)
    compared.near("x H", int8_kernels.rotate(x), _turned(x))
    _int8_near("rows", int8_kernels.quantise_rows(x), x)
    _int8_near("joined rows", int8_kernels.quantise_joined([x, dy]), torch.cat([x, dy], 1))
    y, rstd, _, rows = int8_kernels.rms_norm_forward_int8(x, weight, EPS)
    _int8_near("the norm", rows, _turned(y))
    wide = x.double()
    truth = wide * (wide.square().mean(1, keepdim=True) + EPS).rsqrt() * weight.double()
    compared.near("y", y, truth)
    dx, rows = int8_kernels.rms_norm_backward_int8(dy, x, weight, rstd, eps=EPS)
    plain, _ = norm_kernels.rms_norm_backward(dy, x, weight, rstd, eps=EPS)
    compared.near("dx", dx, plain.double(), slack=2.0)
    _int8_near("the norm's gradient", rows, _turned(dx))
    _int8_codes_of_four_bits()
    return f"{said(compared)}; codes within half a scale"


def _int8_codes_of_four_bits() -> None:
    bits, truth = four_bit_case()
    for input_grad, exact in ((False, _turned(truth)), (True, _turned(truth.t()))):
        scales = exact.abs().amax(1, keepdim=True).float() / 127
        codes = four_bit_to_int8(bits, scales, input_grad=input_grad)
        # On a GPU they are turned in 16 bits.
        _int8_near("a 4-bit weight", (codes, scales), exact, allowed=0.6)


def _turned(x: Tensor) -> Tensor:
    """x · H in fp64, H written out by its definition: (-1)^(bits of i & j) / √size in blocks of `size`."""
    size = int8_kernels.rotation_of(x.shape[1])
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    matrix = torch.tensor(signs, dtype=torch.float64, device=x.device) * size**-0.5
    return (x.double().reshape(-1, size) @ matrix).view(x.shape)


def int8_products() -> str:
    """Products of codes, with an adapter's share and a residual added on the way out; both directions of a weight."""
    _needs_int8()
    compared, dtype = Comparison(), torch.bfloat16
    x, dy, weight = (draw(m, n, dtype=dtype, seed=m) for m, n in ((130, 320), (130, 144), (144, 320)))
    left, right = int8_kernels.quantise_rows(x, rotated=True), int8_kernels.quantise_weight(weight)
    share = LowRank(draw(130, 16, dtype=dtype, seed=2), draw(144, 16, dtype=dtype, seed=3), 0.5)
    residual = draw(130, 144, dtype=dtype, seed=4)
    product = (left[0].double() * left[1].double()) @ (right[0].double() * right[1].double()).T
    compared.near("Y", int8_kernels.product(left, right), product, slack=2.0)
    found = int8_kernels.product(left, right, low_rank=share, residual=residual)
    whole = product + 0.5 * share.xa.double() @ share.b.double().T + residual.double()
    compared.near("Y + LoRA + residual", found, whole, slack=2.0)
    back = int8_kernels.quantise_weight_input_grad([weight])
    _int8_near("a turned weight", back, _turned(weight.t()))
    codes = int8_kernels.quantise_rows(dy, rotated=True)
    product = (codes[0].double() * codes[1].double()) @ (back[0].double() * back[1].double()).T
    compared.near("dX", int8_kernels.product(codes, back), product, slack=2.0)
    # Two roundings to 127 steps of a row's largest number, over rows of normal numbers: about 1.2 % of the norm.
    close(compared, "x Wᵀ", found.double() - residual.double() - 0.5 * share.xa.double() @ share.b.double().T,
          x.double() @ weight.double().T, bound=0.03)  # fmt: skip
    dense = int8_kernels.dequantise(*right, torch.float32)
    close(compared, "weight", dense, weight, bound=0.02)
    return said(compared)
