"""Products with low-rank adapters (LoRA, arXiv 2106.09685): tall matrices times factors of rank R, usually 8 to 128.

With XA = X Aᵀ [T, ΣR] for all adapters of a group side by side, and per adapter i its columns XA_i [T, R_i]:

    up      Y_i   = base_i + s_i · XA_i B_iᵀ
    down    XA    = X Aᵀ
    outputs dXA_i = s_i · dY_i B_i,   dB_i += s_i · dY_iᵀ XA_i       (one reading of dY for both)
    input   dA   += dXAᵀ X

Every product here is bound by reading or writing the tall matrix, so the aim is to touch it once. Sums over tokens are
split and added in a fixed order: results do not depend on timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.hardware import probe
from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton

#: most adapters one launch takes: q, k and v
MOST_PARTS = 3
#: highest rank of one adapter that the kernels hold in registers
MOST_RANK = 128
#: up to which rank the partial sums of `output_grads` cost less than a second reading of dY: written and read, they are
#: an eighth of it at rank 16 (512 columns a block), half of it at 32 (256 columns), twice it at 64
ONE_PASS_RANK = 32
#: up to which rank a consumer adds an adapter's share on the way in
DEFERRED_RANK = 64


class LowRank(NamedTuple):
    """An adapter's share of an output that is still to be added: scaling · xa bᵀ; xa [T, R], b [out, R]."""

    xa: Tensor
    b: Tensor
    scaling: float

    def add_to(self, base: Tensor) -> Tensor:
        """base [T, out] + the share, unrounded in fp32 (fp64): the reference of kernels that add it on the fly."""
        dtype = math_dtype(base.dtype)
        return torch.addmm(base.to(dtype), self.xa.to(dtype), self.b.to(dtype).t(), alpha=self.scaling)

    def rows(self, at: slice) -> LowRank:
        """The share of some rows."""
        return self._replace(xa=self.xa[at])


# --- gradients that accumulate in fp32 -------------------------------------------------------------------------

_direct: dict[tuple[torch.device, torch.dtype], tuple[bool, str]] = {}


def accumulate_product_(out: Tensor, left_t: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """out [m, n] += alpha · left_t [m, T] @ right [T, n]; 16-bit factors keep their fp32 sum where `out` is fp32."""
    if out.dtype == left_t.dtype:
        return out.addmm_(left_t, right, alpha=alpha)
    if not left_t.is_cuda or out.dtype != torch.float32:
        return out.add_(left_t @ right, alpha=alpha)
    if accumulates_directly(left_t.device, left_t.dtype)[0]:
        return torch.addmm(out, left_t, right, out_dtype=torch.float32, alpha=alpha, out=out)
    return out.add_(torch.mm(left_t, right, out_dtype=torch.float32), alpha=alpha)


def accumulates_directly(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether `torch.addmm` adds a product of 16-bit factors to an fp32 matrix in place, and why.

    Tried once per process, device and dtype on a small product, since releases of torch differ in it. While a CUDA
    graph is captured nothing can be tried: the answer is then no, and is not remembered.
    """
    key = (device, dtype)
    if key not in _direct:
        if torch.cuda.is_current_stream_capturing():
            return False, "not tried before the capture began"
        _direct[key] = _try_direct(device, dtype)
    return _direct[key]


def _try_direct(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    left = (torch.arange(64 * 16, device=device).view(64, 16) % 7 - 3).to(dtype)
    right = (torch.arange(64 * 32, device=device).view(64, 32) % 5 - 2).to(dtype)
    # 1/4096 is lost where the result passes through 16 bits; small integers are exact in every order of summation.
    out = torch.full((16, 32), 1 / 4096, dtype=torch.float32, device=device)
    expected = out + 2.0 * (left.float().t() @ right.float())
    where = out.data_ptr()
    try:
        found = torch.addmm(out, left.t(), right, out_dtype=torch.float32, alpha=2.0, out=out)
    except (RuntimeError, TypeError) as error:
        return False, f"torch.addmm refuses: {str(error).splitlines()[0]}"
    if found.data_ptr() != where or not torch.equal(found, expected):
        return False, "torch.addmm gives other numbers"
    return True, "torch.addmm with out_dtype adds in place"


# --- which implementation -------------------------------------------------------------------------------------


def fits_kernels(
    tensor: Tensor, ranks: Sequence[int], impl: Impl | None = None, most_rank: int = MOST_RANK
) -> bool:
    """Whether the Triton kernels take a group of adapters of these ranks on tensors like this one.

    Without being asked for they run in 16 bits on GPUs whose matrix units they use (Ampere and newer); products in fp32
    are the matrix library's.
    """
    if not 0 < len(ranks) <= MOST_PARTS or max(ranks) > MOST_RANK:
        return False
    if impl is not None:
        return impl == "triton"
    suits = tensor.dtype in (torch.bfloat16, torch.float16) and max(ranks) <= most_rank
    return suits and use_triton(tensor, impl) and probe().capability >= (8, 0)


def down_wins(tokens: int, width: int, total_rank: int) -> bool:
    """Whether the Triton `down` beats the matrix library for x [tokens, width]: it does where few programs read x."""
    return False


def a_grad_wins(tokens: int, width: int, total_rank: int) -> bool:
    """Whether the Triton `accumulate_a_` beats the matrix library with its own split over tokens."""
    return False


def producer_wins(tokens: int, width: int, total_rank: int) -> bool:
    """Whether the kernel that makes x [tokens, width] should form XA, and in backward dXAᵀ x, along the way."""
    return total_rank <= 32


# --- products --------------------------------------------------------------------------------------------------


def up(
    xa: Tensor,
    bs: Sequence[Tensor],
    scalings: Sequence[float],
    bases: Sequence[Tensor | None],
    *,
    addends: Sequence[Tensor] = (),
    inplace: bool = False,
    impl: Impl | None = None,
) -> list[Tensor]:
    """Y_i = base_i + s_i · XA_i B_iᵀ for adapters whose columns lie side by side in xa, in one launch.

    Args:
        xa: [T, ΣR]. bs: [out_i, R_i] each.
        bases: [T, out_i], a bias [out_i], or None for nothing, each.
        addends: up to two more bases [T, out] for a single adapter; a new result has their dtype then, else xa's.
        inplace: write over the bases, which must be matrices.
    """
    if len(bs) <= MOST_PARTS and fits_kernels(xa, [b.shape[1] for b in bs], impl):
        from pronghorn.kernels.triton.lora import up as triton_up

        return triton_up(xa, bs, scalings, bases, addends, inplace)
    outs = []
    for part, b, scaling, base in zip(_columns(xa, bs), bs, scalings, bases, strict=True):
        if inplace:
            assert base is not None
            y = base.addmm_(part, b.t(), alpha=scaling)
            for addend in addends:
                y.add_(addend)
            outs.append(y)
            continue
        if base is None:  # beta = 0: what is added is not read
            y = torch.addmm(part.new_empty(()), part, b.t(), beta=0, alpha=scaling)
        else:
            y = torch.addmm(base.to(xa.dtype), part, b.t(), alpha=scaling)
        for addend in addends:
            y = addend + y
        outs.append(y)
    return outs


def down(x: Tensor, a: Tensor, *, impl: Impl | None = None) -> Tensor:
    """XA = x [T, in] aᵀ with a [ΣR, in]: [T, ΣR] in x's dtype."""
    wins = impl is not None or down_wins(x.shape[0], x.shape[1], a.shape[0])
    if wins and fits_kernels(x, [a.shape[0]], impl):
        from pronghorn.kernels.triton.lora import down as triton_down

        return triton_down(x, a)
    return x @ a.t()


def output_grads(
    dys: Sequence[Tensor],
    bs: Sequence[Tensor],
    scalings: Sequence[float],
    xa: Tensor | None = None,
    b_grads: Sequence[Tensor | None] = (),
    *,
    impl: Impl | None = None,
) -> Tensor:
    """dXA [T, ΣR] with dXA_i = s_i · dY_i B_i; and b_grads_i [out_i, R_i] fp32 += s_i · dY_iᵀ XA_i where given.

    Args:
        dys: [T, out_i] each, rows may be strided. xa: [T, ΣR], needed for gradients of B only.
    """
    if any(grad is not None for grad in b_grads) and xa is None:
        raise ValueError("gradients of B need XA")
    if fits_kernels(dys[0], [b.shape[1] for b in bs], impl, ONE_PASS_RANK):
        from pronghorn.kernels.triton.lora_grads import output_grads as triton_output_grads

        return triton_output_grads(dys, bs, scalings, xa, b_grads)[0]
    dxa = dys[0].new_empty(dys[0].shape[0], sum(b.shape[1] for b in bs))
    for dy, b, scaling, out in zip(dys, bs, scalings, _columns(dxa, bs), strict=True):
        torch.addmm(out, dy, b, beta=0, alpha=scaling, out=out)
    if xa is not None:
        for dy, part, scaling, grad in zip(dys, _columns(xa, bs), scalings, b_grads, strict=False):
            if grad is not None:
                accumulate_product_(grad, dy.t(), part, scaling)
    return dxa


def output_grads_and_start(
    dys: Sequence[Tensor],
    bs: Sequence[Tensor],
    scalings: Sequence[float],
    a: Tensor,
    xa: Tensor | None = None,
    b_grads: Sequence[Tensor | None] = (),
    *,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """`output_grads`, and the adapters' share of dX, dXA A [T, in] for a [ΣR, in], to which the weights' is added."""
    if fits_kernels(dys[0], [b.shape[1] for b in bs], impl, ONE_PASS_RANK):
        from pronghorn.kernels.triton.lora_grads import output_grads as triton_output_grads

        dxa, start = triton_output_grads(dys, bs, scalings, xa, b_grads, a)
        assert start is not None
        return dxa, start
    dxa = output_grads(dys, bs, scalings, xa, b_grads, impl=impl)
    return dxa, dxa @ a


def accumulate_a_(a_grad: Tensor, dxa: Tensor, x: Tensor, *, impl: Impl | None = None) -> Tensor:
    """a_grad [ΣR, in] fp32 += dxaᵀ x for dxa [T, ΣR] and x [T, in]."""
    wins = impl is not None or a_grad_wins(x.shape[0], x.shape[1], dxa.shape[1])
    if wins and fits_kernels(x, [dxa.shape[1]], impl):
        from pronghorn.kernels.triton.lora_grads import accumulate_a

        return accumulate_a(a_grad, dxa, x)
    return accumulate_product_(a_grad, dxa.t(), x)


def _columns(xa: Tensor, bs: Sequence[Tensor]) -> list[Tensor]:
    """xa [T, ΣR] as one view [T, R_i] per adapter."""
    return list(xa.split([b.shape[1] for b in bs], dim=1))
