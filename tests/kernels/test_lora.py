"""Low-rank products against fp64: odd shapes, strided rows, ranks from 4 to 128, sums that accumulate."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels import lora
from tests.kernels.compare import DTYPES, IMPLS, RELATIVE, assert_near, random

# tokens, output widths, ranks
GROUPS = [(5, (40,), (4,)), (70, (300, 24, 24), (16, 8, 16)), (129, (130, 70), (32, 32)), (3, (17,), (128,))]
WIDTHS = [(5, 40, 4), (70, 300, 48), (130, 129, 24), (1, 16, 128)]


def columns(x, ranks):
    return x.split(list(ranks), dim=1)


def factors(widths, ranks, dtype, device):
    """One B [width, rank] each."""
    sizes = enumerate(zip(widths, ranks, strict=True))
    return [random(w, r, dtype=dtype, device=device, seed=i, scale=0.4) for i, (w, r) in sizes]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,widths,ranks", GROUPS)
@pytest.mark.parametrize("base", ["none", "bias", "matrix", "inplace"])
def test_up(impl, dtype, tokens, widths, ranks, base, device):
    xa = random(tokens, sum(ranks), dtype=dtype, device=device, scale=0.4)
    bs = [
        random(w, r, dtype=dtype, device=device, seed=i, scale=0.4)
        for i, (w, r) in enumerate(zip(widths, ranks, strict=True))
    ]
    wide_rows = [random(tokens, w + 8, dtype=dtype, device=device, seed=9 + i) for i, w in enumerate(widths)]
    bases = {
        "none": [None] * len(bs),
        "bias": [rows[0, :w] for rows, w in zip(wide_rows, widths, strict=True)],
    }.get(base, [rows[:, :w] for rows, w in zip(wide_rows, widths, strict=True)])
    scalings = [0.5, 2.0, 1.0][: len(bs)]
    expected, largest = [], []
    for part, b, s, held in zip(columns(xa, ranks), bs, scalings, bases, strict=True):
        y = s * part.double() @ b.double().t()
        expected.append(y if held is None else held.double() + y)
        largest.append(y.abs() if held is None else held.double().abs() + y.abs())
    found = lora.up(xa, bs, scalings, bases, inplace=base == "inplace", impl=impl)
    for i, want in enumerate(expected):
        assert found[i].dtype == dtype
        if impl == "triton":
            assert_near(found[i], want, slack=2.0)
        else:  # cuBLAS may round the product before it adds the base
            assert ((found[i].double() - want).abs() <= 2 * (RELATIVE[dtype] * largest[i] + 1e-5)).all()
        if base == "inplace":
            assert found[i].data_ptr() == bases[i].data_ptr()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_up_with_a_residual(impl, dtype, device):
    """residual + base + share in the residual's dtype; the residual is left as it is."""
    xa, b = random(9, 8, dtype=dtype, device=device), random(20, 8, dtype=dtype, device=device)
    base = random(9, 20, dtype=dtype, device=device, seed=2)
    residual = random(9, 20, dtype=torch.float32, device=device, seed=3)
    kept = residual.clone()
    (found,) = lora.up(xa, [b], [0.5], [base], addends=[residual], impl=impl)
    assert found.dtype == torch.float32 and torch.equal(residual, kept)
    want = residual.double() + base.double() + 0.5 * xa.double() @ b.double().t()
    error = (found.double() - want).abs().max()
    # The reference rounds the branch to its own dtype first.
    assert error <= (2**-7 if dtype == torch.bfloat16 and impl == "torch" else 2e-5) * want.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_up_by_a_transposed_matrix_and_several_bases(impl, dtype, count, device):
    """The input gradient of a group: dXA times A, which lies as [R, in], and the products of its weights."""
    dxa, a = (
        random(70, 48, dtype=dtype, device=device, scale=0.2),
        random(48, 130, dtype=dtype, device=device),
    )
    parts = [random(70, 130, dtype=dtype, device=device, seed=i) for i in range(count + 1)]
    (found,) = lora.up(dxa, [a.t()], [1.0], parts[:1], addends=parts[1:], impl=impl)
    product = dxa.double() @ a.double()
    want = sum((part.double() for part in parts), product)
    if impl == "triton":
        assert_near(found, want, slack=2.0)
    else:  # rounds once for every part
        largest = sum((part.double().abs() for part in parts), product.abs())
        assert ((found.double() - want).abs() <= (count + 2) * (RELATIVE[dtype] * largest + 1e-5)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,width,rank", WIDTHS)
def test_down(impl, dtype, tokens, width, rank, device):
    x = random(tokens, width + 3, dtype=dtype, device=device)[:, :width]
    a = random(rank, width, dtype=dtype, device=device, seed=1)
    assert_near(lora.down(x, a, impl=impl), x.double() @ a.double().t())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,widths,ranks", GROUPS)
@pytest.mark.parametrize("wanted", ["all", "first", "none"])
@pytest.mark.parametrize("start_too", [False, True])
def test_output_grads(impl, dtype, tokens, widths, ranks, wanted, start_too, device):
    dys = [random(tokens, w + 8, dtype=dtype, device=device, seed=i)[:, :w] for i, w in enumerate(widths)]
    bs = [
        random(w, r, dtype=dtype, device=device, seed=i)
        for i, (w, r) in enumerate(zip(widths, ranks, strict=True))
    ]
    xa = random(tokens, sum(ranks), dtype=dtype, device=device, seed=4)
    scalings = [0.5, 2.0, 1.0][: len(bs)]
    sums = [torch.full(b.shape, 3.0, dtype=torch.float32, device=device) for b in bs]
    count = {"all": len(bs), "first": 1, "none": 0}[wanted]
    grads = [grad if i < count else None for i, grad in enumerate(sums)]
    given = (xa, grads) if count else (None, ())
    if start_too:
        a = random(sum(ranks), 70, dtype=dtype, device=device, seed=7, scale=0.1)
        dxa, start = lora.output_grads_and_start(dys, bs, scalings, a, *given, impl=impl)
        assert start.dtype == dtype
        assert_near(start, dxa.double() @ a.double())
    else:
        dxa = lora.output_grads(dys, bs, scalings, *given, impl=impl)
    assert dxa.dtype == dtype
    for i, (dy, b, s) in enumerate(zip(dys, bs, scalings, strict=True)):
        assert_near(columns(dxa, ranks)[i], s * dy.double() @ b.double(), slack=2.0)
        want = 3 + s * dy.double().t() @ columns(xa, ranks)[i].double() if i < count else sums[i] * 0 + 3
        if impl == "torch" and not dys[0].is_cuda and dtype != torch.float32:
            # The plain way on a CPU rounds the product to 16 bits before it is added.
            bound = 2.0**-7 * (want.double() - 3).abs() + 1e-4
            assert ((sums[i].double() - want).abs() <= bound).all()
        else:
            assert_near(sums[i], want, slack=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens,width,rank", WIDTHS)
def test_a_gradient(dtype, tokens, width, rank, device):
    x = random(tokens, width + 3, dtype=dtype, device=device)[:, :width]
    dxa = random(tokens, rank, dtype=dtype, device=device, seed=1)
    grad = torch.full((rank, width), 2.0, dtype=torch.float32, device=device)
    found = lora.accumulate_a_(grad, dxa, x, impl="triton")
    assert found.data_ptr() == grad.data_ptr()
    assert_near(found, 2 + dxa.double().t() @ x.double(), slack=4.0)


@pytest.mark.parametrize("tile", [(32, 128, 4, 3), (64, 256, 4, 2), (16, 64, 4, 2)])
@pytest.mark.parametrize("pieces", [1, 3])
def test_tiles_and_pieces(tile, pieces, device, monkeypatch):
    """Several blocks of columns, shares of tokens and pieces of dXA A, whatever a shape would be given."""
    from pronghorn.kernels.triton import lora_grads, lora_sums

    monkeypatch.setattr(lora_grads, "grads_tile", lambda *_: lora_grads.Tile(*tile))
    starts = {"PIECES": pieces, "BT": 32, "BO": 64, "DEPTH": 2, "num_warps": 4}
    monkeypatch.setattr(lora_sums, "start_config", lambda *_: starts)
    lora_grads.grads_config.cache_clear()
    widths, ranks = (300, 72, 136), (16, 16, 8)
    dys = [random(200, w, dtype=torch.float32, device=device, seed=i) for i, w in enumerate(widths)]
    bs = factors(widths, ranks, torch.float32, device)
    xa = random(200, 40, dtype=torch.float32, device=device, seed=5)
    a = random(40, 330, dtype=torch.float32, device=device, seed=6)
    grads = [torch.zeros(b.shape, device=device) for b in bs]
    dxa, start = lora.output_grads_and_start(dys, bs, [1.0, 0.5, 2.0], a, xa, grads, impl="triton")
    lora_grads.grads_config.cache_clear()
    want = [s * dy.double() @ b.double() for s, dy, b in zip((1.0, 0.5, 2.0), dys, bs, strict=True)]
    assert_near(dxa, torch.cat(want, 1), slack=2.0)
    assert_near(start, dxa.double() @ a.double(), slack=2.0)
    for s, dy, part, grad in zip((1.0, 0.5, 2.0), dys, columns(xa, ranks), grads, strict=True):
        assert_near(grad, s * dy.double().t() @ part.double(), slack=4.0)


def test_sums_are_the_same_every_time(device):
    """Shares of tokens are added in a fixed order: equal bits, whatever the timing."""
    dy = random(300, 200, dtype=torch.float32, device=device)
    b, xa = (
        random(200, 16, dtype=torch.float32, device=device),
        random(300, 16, dtype=torch.float32, device=device),
    )
    results = []
    for _ in range(2):
        grad = torch.zeros(200, 16, device=device)
        results.append((lora.output_grads([dy], [b], [1.0], xa, [grad], impl="triton"), grad))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize(
    "tokens,widths",
    [(8192, (14336, 14336)), (8192, (4096, 1024, 1024)), (2048, (1536, 256, 256)), (17, (64,))],
)
@pytest.mark.parametrize("rank", [16, 32, 64, 128])
def test_shares_cover_all_tokens(tokens, widths, rank):
    from pronghorn.kernels.triton.lora_grads import grads_config

    config = grads_config(tokens, widths, rank, 2, 132, 232448)
    shares, each = config["SHARES"], config["TOKENS_EACH"]
    assert (shares - 1) * each < tokens <= shares * each and each % config["BT"] == 0


def test_gradients_of_b_need_xa(device):
    dy, b = torch.zeros(2, 4, device=device), torch.zeros(4, 1, device=device)
    with pytest.raises(ValueError, match="XA"):
        lora.output_grads([dy], [b], [1.0], None, [b])
