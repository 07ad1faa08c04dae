"""Products with an adapter and a residual inside against the formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pronghorn.kernels import products, tiles
from pronghorn.kernels.products import Product
from tests.kernels.compare import assert_near, random

#: rows, summed, columns: less than a tile, edges in every direction, several rounds of a processor's tiles
SHAPES = [(1, 64, 64), (77, 1088, 200), (515, 320, 1160), (2100, 1536, 8960)]
DTYPES = (torch.bfloat16, torch.float16)
CASES = [(SHAPES[2], rank, torch.bfloat16) for rank in (0, 8, 16, 24, 48, 64)] + [
    (shape, 16, dtype) for shape in SHAPES for dtype in DTYPES
]


@pytest.fixture(params=["torch", None])
def impl(request: pytest.FixtureRequest, device: torch.device) -> Any:
    """The formulas in torch, and what the device runs."""
    reason = tiles.why_not(device, torch.bfloat16)
    if request.param is None and reason is not None:
        pytest.skip(reason)
    return request.param


def product_of(
    shape: tuple[int, int, int], turned: bool, rank: int, residual: bool, dtype: torch.dtype, device: Any
) -> Product:
    rows, summed, columns = shape

    def draw(*size: int, seed: int, scale: float = 1.0) -> Tensor:
        return random(*size, dtype=dtype, device=device, seed=seed, scale=scale)

    def side(inner: int, seed: int, scale: float) -> Tensor:
        return draw(*((columns, inner) if turned else (inner, columns)), seed=seed, scale=scale)

    return Product(
        draw(rows, summed, seed=0),
        side(summed, 1, summed**-0.5),
        turned,
        draw(rows, rank, seed=2, scale=0.5) if rank else None,
        side(rank, 3, 0.3) if rank else None,
        draw(rows, columns, seed=4) if residual else None,
    )


def truth_of(product: Product) -> Tensor:
    def times(x: Tensor, w: Tensor) -> Tensor:
        return x.double() @ (w.double().t() if product.turned else w.double())

    y = times(product.x, product.weight)
    if product.xa is not None and product.b is not None:
        y += times(product.xa, product.b)
    return y if product.residual is None else y + product.residual.double()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("shape", "rank", "dtype"), CASES)
def test_product(
    shape: tuple[int, int, int],
    rank: int,
    dtype: torch.dtype,
    turned: bool,
    residual: bool,
    device: torch.device,
    impl: Any,
) -> None:
    if impl == "torch" and shape == SHAPES[-1]:
        pytest.skip("the formulas are the same at every size")
    product = product_of(shape, turned, rank, residual, dtype, device)
    found = products.multiply(product, impl=impl)
    assert_near(found, truth_of(product))
    assert torch.equal(products.multiply(product, impl=impl), found)


@pytest.mark.parametrize("turned", [False, True])
def test_the_result_may_lie_where_the_residual_lay_and_parts_in_wider_ones(
    turned: bool, device: torch.device, impl: Any
) -> None:
    shape = (515, 320, 1160)
    product = product_of(shape, turned, 16, True, torch.bfloat16, device)
    apart, truth = products.multiply(product, impl=impl), truth_of(product)
    wide = torch.zeros(515, 400, dtype=torch.bfloat16, device=device)
    wide[:, 40:360] = product.x
    assert product.residual is not None
    found = products.multiply(
        Product(wide[:, 40:360], product.weight, turned, product.xa, product.b, product.residual),
        product.residual,
        impl=impl,
    )
    assert found is product.residual and torch.equal(found, apart)
    assert_near(found, truth)


def test_who_does_not_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(rank: int = 16, rows: int = 8192, columns: int = 4096, width: int = 4096) -> str | None:
        x = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
        w = torch.empty(columns, width, dtype=torch.bfloat16, device="meta")
        b = torch.empty(columns, rank, dtype=torch.bfloat16, device="meta")
        return products.why_not(x, w, True, rank, b)

    assert "not on a meta" in (reason() or "")
    monkeypatch.setattr(tiles, "why_not", lambda device, dtype: None)
    assert reason() is None and reason(rank=8) is None
    assert "of rank 128" in (reason(rank=128) or "")
    for wrong in ({"rank": 12}, {"width": 4100}, {"rows": 16384, "columns": 1}, {"columns": 50257}):
        assert "16 bytes" in (reason(**wrong) or "")
    assert "empty" in (reason(rows=16384, columns=576) or "") and "idle" in (reason(rows=512) or "")
