"""The gated unit inside the products before and behind it, with all of their adapters: one launch each way.

    gate = x Wgᵀ + XA_g B_gᵀ,   up = x Wuᵀ + XA_u B_uᵀ,   act = f(gate) · up,   XA_d = act A_dᵀ
    dact = dy W_d + dXA_d A_d,   dgate = dact · up · f'(gate),   dup = dact · f(gate),   dA_d += dXA_dᵀ act

XA come with their scaling, [XA_g XA_u] side by side; gate and up are complete here, adapters included, and rounded
before f takes them. gate, up and dact are the widest tensors of a layer: here none is read again on the way to act,
dact is never written, and gate and up need not be.

On Hopper's matrix units (`triton/glu_hopper.py`); the formulas in torch are the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype
from pronghorn.kernels.glu import ACTIVATIONS, glu_backward, glu_forward
from pronghorn.kernels.lora import accumulate_product_
from pronghorn.kernels.tiles import COLUMNS, PROCESSORS, ROWS, Order, Sums, groups_of, on_hopper, order_of

#: ranks of gate's and up's adapters that one step of the product takes side by side
RANKS = (8, 16, 32)
#: largest rank of the down projection's
MOST_RANK_DOWN = 32
#: columns of a tile of act forward, beside as many of gate and of up
HALF = 128
#: Rows of tiles that are gone through together forward, by groups of 64 rows in a tile, and columns of them backward.
#: Where these divide the number of processors (132), each stays in its row, or column, and keeps a sum of its tiles.
TOGETHER = {2: 16, 3: 11}
COLUMNS_TOGETHER = 12


@dataclass(frozen=True)
class GateUp:
    """What gate and up are made of: x [T, H], weights [I, H]; xa [T, 2R], scaled, with B [I, R] of gate and up; a
    [R, I] of the down projection. keep: whether gate and up are wanted themselves."""

    x: Tensor
    gate_weight: Tensor
    up_weight: Tensor
    activation: str
    xa: Tensor | None = None
    gate_b: Tensor | None = None
    up_b: Tensor | None = None
    a: Tensor | None = None
    keep: bool = True


@dataclass(frozen=True)
class DownGrad:
    """What gradients of gate and up [T, I] are made of, and written over: dy [T, H], weight [H, I], dxa [T, R], scaled,
    and a [R, I]; a_grad [R, I] fp32 is added to."""

    dy: Tensor
    weight: Tensor
    gate: Tensor
    up: Tensor
    activation: str
    dxa: Tensor | None = None
    a: Tensor | None = None
    a_grad: Tensor | None = None


class Tiling(NamedTuple):
    """Groups of 64 rows in a tile, the order that programs take tiles in, and the partial sums that they leave."""

    groups: int
    order: Order
    sums: Sums


def forward_tiling(rows: int, width: int, processors: int = PROCESSORS) -> Tiling:
    """Of act [rows, width]; sums of XA_d."""
    groups = groups_of(rows, width, HALF)
    tiles, across = -(-rows // (64 * groups)), -(-width // HALF)
    order = order_of(tiles, across, processors, TOGETHER[groups])
    return Tiling(groups, order, order.sums(tiles, across, 64 * groups))


def backward_tiling(rows: int, width: int, processors: int = PROCESSORS) -> Tiling:
    """Of dact [rows, width], by columns; sums of dA_d, of which two groups of warps write one each."""
    tiles, across = -(-width // COLUMNS), -(-rows // ROWS)
    order = order_of(tiles, across, processors, COLUMNS_TOGETHER)
    return Tiling(ROWS // 64, order, order.sums(tiles, across, COLUMNS).times(2))


def gate_up_act(
    call: GateUp, *, impl: Impl | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """gate and up (None unless kept; columns of one matrix), act [T, I], and XA_d [T, R] where `a` is given."""
    x, n = call.x, call.gate_weight.shape[0]
    _check(call.activation)
    wide = x.new_empty(x.shape[0], 2 * n) if call.keep else None
    act = x.new_empty(x.shape[0], n)
    xa_down = None if call.a is None else x.new_empty(x.shape[0], call.a.shape[0])
    gate, up = (act, act) if wide is None else wide.split(n, 1)
    if on_hopper(x, impl):
        from pronghorn.kernels.triton.glu_hopper import forward

        forward(call, gate, up, act, xa_down)
    else:
        _reference(call, gate, up, act, xa_down)
    return (None, None, act, xa_down) if wide is None else (gate, up, act, xa_down)


def gate_up(call: GateUp, *, impl: Impl | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """gate and up [T, I], columns of one matrix, and XA_d where `a` is given: the numbers that `gate_up_act` made,
    without act."""
    x, n = call.x, call.gate_weight.shape[0]
    wide = x.new_empty(x.shape[0], 2 * n)
    xa_down = None if call.a is None else x.new_empty(x.shape[0], call.a.shape[0])
    gate, up = wide.split(n, 1)
    if on_hopper(x, impl):
        from pronghorn.kernels.triton.glu_hopper import forward

        forward(call, gate, up, None, xa_down)
    else:
        _reference(call, gate, up, None, xa_down)
    return gate, up, xa_down


def down_backward_(call: DownGrad, *, impl: Impl | None = None) -> None:
    """gate and up become their gradients; a_grad += dXA_dᵀ act."""
    _check(call.activation)
    if on_hopper(call.dy, impl):
        from pronghorn.kernels.triton.glu_hopper import backward

        backward(call)
        return
    dtype = math_dtype(call.dy.dtype)
    dact = call.dy.to(dtype) @ call.weight.to(dtype)
    if call.dxa is not None and call.a is not None:
        dact = torch.addmm(dact, call.dxa.to(dtype), call.a.to(dtype))
    act, dgate, dup = glu_backward(
        dact, call.gate.to(dtype), call.up.to(dtype), call.activation, impl="torch"
    )
    if call.a_grad is not None and call.dxa is not None:
        accumulate_product_(call.a_grad, call.dxa.to(dtype).t(), act)
    call.gate.copy_(dgate)
    call.up.copy_(dup)


def _reference(call: GateUp, gate: Tensor, up: Tensor, act: Tensor | None, xa_down: Tensor | None) -> None:
    """The formulas, sums in fp32."""
    dtype = math_dtype(call.x.dtype)
    x, made = call.x.to(dtype), []
    for i, (weight, b) in enumerate(((call.gate_weight, call.gate_b), (call.up_weight, call.up_b))):
        y = x @ weight.to(dtype).t()
        if call.xa is not None and b is not None:
            rank = b.shape[1]
            y = torch.addmm(y, call.xa[:, i * rank : (i + 1) * rank].to(dtype), b.to(dtype).t())
        made.append(y.to(call.x.dtype))
    if call.keep or act is None:
        gate.copy_(made[0])
        up.copy_(made[1])
    if act is not None or xa_down is not None:
        value = glu_forward(made[0], made[1], call.activation, impl="torch")
        if act is not None:
            act.copy_(value)
        if xa_down is not None and call.a is not None:
            xa_down.copy_(value.to(dtype) @ call.a.to(dtype).t())


def _check(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation '{activation}' is not one of {', '.join(ACTIVATIONS)}")
