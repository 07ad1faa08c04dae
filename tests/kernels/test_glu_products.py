"""The gated unit inside the products around it against the formulas in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pronghorn.kernels import glu_products, tiles
from pronghorn.kernels.glu_products import DownGrad, GateUp
from tests.kernels.compare import assert_near, random
from tests.kernels.test_glu import ORACLES

#: tokens, hidden, intermediate: less than a tile, edges in every direction, several rounds of a processor's tiles
SHAPES = [(1, 64, 64), (77, 64, 200), (300, 320, 1160), (2100, 1536, 8960)]
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["torch", 2, 3])
def impl(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The formulas in torch, and what the device runs, forward by tiles of two and of three groups of rows."""
    if request.param == "torch":
        return "torch"
    reason = tiles.why_not(device, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(glu_products, "groups_of", lambda *sizes: request.param)
    return None


def skip_large(shape: tuple[int, int, int], impl: Any) -> None:
    if impl == "torch" and shape == SHAPES[-1]:
        pytest.skip("the formulas are the same at every size")


def parts(shape: tuple[int, int, int], rank: int, rank_down: int, dtype: torch.dtype, device: Any) -> dict:
    tokens, hidden, width = shape

    def draw(*size: int, seed: int, scale: float = 1.0) -> Tensor:
        return random(*size, dtype=dtype, device=device, seed=seed, scale=scale)

    adapters = {
        "xa": draw(tokens, 2 * rank, seed=3, scale=0.5),
        "gate_b": draw(width, rank, seed=4, scale=0.3),
        "up_b": draw(width, rank, seed=5, scale=0.3),
    }
    return {
        "x": draw(tokens, hidden, seed=0),
        "gate_weight": draw(width, hidden, seed=1, scale=hidden**-0.5),
        "up_weight": draw(width, hidden, seed=2, scale=hidden**-0.5),
        "a": draw(rank_down, width, seed=6, scale=width**-0.5) if rank_down else None,
        **(adapters if rank else {}),
    }


RANKS = [(8, 8), (16, 16), (32, 24), (0, 32), (16, 0), (0, 0)]
#: whole groups of tiles whose sums stay with a program, forward and backward, with few programs; and rows, or columns,
#: left over that are for fewer programs than there are
WHOLE_GROUPS = [(2112, 64, 264), (384, 64, 3072), (5696, 64, 704), (704, 64, 7232)]
#: each kind of adapter, and each shape and dtype
CASES = [
    *((SHAPES[2], *ranks, torch.bfloat16) for ranks in RANKS),
    *((shape, 16, 16, dtype) for shape in SHAPES for dtype in DTYPES),
    *((shape, 16, 16, torch.bfloat16) for shape in WHOLE_GROUPS),
    (SHAPES[3], 32, 32, torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "rank", "rank_down", "dtype"), CASES)
def test_forward(
    shape: tuple[int, int, int],
    rank: int,
    rank_down: int,
    dtype: torch.dtype,
    device: torch.device,
    impl: Any,
) -> None:
    skip_large(shape, impl)
    given = parts(shape, rank, rank_down, dtype, device)
    call = GateUp(activation="silu", **given)
    gate, up, act, xa = glu_products.gate_up_act(call, impl=impl)
    assert gate is not None and up is not None and gate.stride(0) == 2 * shape[2]
    for i, (name, found) in enumerate((("gate", gate), ("up", up))):
        truth = given["x"].double() @ given[f"{name}_weight"].double().t()
        if rank:
            truth += given["xa"][:, i * rank : (i + 1) * rank].double() @ given[f"{name}_b"].double().t()
        assert_near(found, truth, slack=2.0)
    assert_near(act, ORACLES["silu"](gate.double()) * up.double(), slack=2.0)
    if rank_down:
        assert xa is not None
        assert_near(xa, act.double() @ given["a"].double().t(), slack=4.0)
    # The same numbers, whatever is written of them.
    alone, also, of_down = glu_products.gate_up(call, impl=impl)
    assert torch.equal(alone, gate) and torch.equal(also, up)
    nothing, neither, again, twice = glu_products.gate_up_act(replace(call, keep=False), impl=impl)
    assert nothing is None and neither is None and torch.equal(again, act)
    if rank_down:
        assert torch.equal(of_down, xa) and torch.equal(twice, xa)
    else:
        assert xa is None and of_down is None and twice is None


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_other_activations(activation: str, device: torch.device, impl: Any) -> None:
    given = parts((150, 128, 400), 16, 16, torch.bfloat16, device)
    gate, up, act, _ = glu_products.gate_up_act(GateUp(activation=activation, **given), impl=impl)
    assert gate is not None and up is not None
    assert_near(act, ORACLES[activation](gate.double()) * up.double(), slack=2.0)
    backward((150, 128, 400), 16, torch.bfloat16, device, impl, activation)


@pytest.mark.parametrize(("shape", "rank", "rank_down", "dtype"), CASES)
def test_backward(
    shape: tuple[int, int, int], rank: int, rank_down: int, dtype: torch.dtype, device: Any, impl: Any
) -> None:
    backward(shape, rank_down, dtype, device, impl, "silu")


def backward(
    shape: tuple[int, int, int], rank: int, dtype: torch.dtype, device: Any, impl: Any, activation: str
) -> None:
    skip_large(shape, impl)
    tokens, hidden, width = shape

    def draw(*size: int, seed: int, scale: float = 1.0) -> Tensor:
        return random(*size, dtype=dtype, device=device, seed=seed, scale=scale)

    dy, weight = draw(tokens, hidden, seed=7), draw(hidden, width, seed=8, scale=hidden**-0.5)
    wide = draw(tokens, 2 * width, seed=9)
    gate, up = wide.split(width, 1)
    dact = dy.double() @ weight.double()
    more: dict[str, Any] = {}
    if rank:
        more = {"dxa": draw(tokens, rank, seed=10, scale=0.5), "a": draw(rank, width, seed=11, scale=0.3)}
        dact += more["dxa"].double() @ more["a"].double()
        before = torch.randn(rank, width, device=device)
        more["a_grad"] = before.clone()
    leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
    act = ORACLES[activation](leaves[0]) * leaves[1]
    grads = torch.autograd.grad(act, leaves, dact)
    glu_products.down_backward_(DownGrad(dy, weight, gate, up, activation, **more), impl=impl)
    assert_near(gate, grads[0], slack=3.0)
    assert_near(up, grads[1], slack=3.0)
    if rank:
        # act is rounded to 16 bits before it is summed over the tokens.
        truth = before.double() + more["dxa"].double().t() @ act.detach()
        off = (more["a_grad"].double() - truth).norm() / truth.norm()
        assert off < 3e-3, f"dA is off by {off:.2g}"


def test_weights_and_results_may_be_parts_of_wider_ones(device: torch.device, impl: Any) -> None:
    stack = random(2 * 256, 192, dtype=torch.bfloat16, device=device, scale=0.1)
    rows = random(200, 384, dtype=torch.bfloat16, device=device)[:, :192]
    gate_weight, up_weight = stack.split(256)
    gate, up, act, _ = glu_products.gate_up_act(GateUp(rows, gate_weight, up_weight, "silu"), impl=impl)
    assert gate is not None and up is not None
    assert_near(up, rows.double() @ up_weight.double().t(), slack=2.0)
    assert_near(act, ORACLES["silu"](gate.double()) * up.double(), slack=2.0)


def test_who_does_not_take_them() -> None:
    assert "16-bit" in str(tiles.why_not(torch.device("cuda"), torch.float32))
    assert "Hopper" in str(tiles.why_not(torch.device("cpu"), torch.bfloat16))
    assert tiles.aligned(torch.zeros(4, 8, dtype=torch.bfloat16), None)
    assert not tiles.aligned(torch.zeros(4, 9, dtype=torch.bfloat16)[:, :8])
    with pytest.raises(ValueError, match="relu"):
        glu_products.gate_up_act(GateUp(*[torch.zeros(8, 8)] * 3, activation="relu"))
