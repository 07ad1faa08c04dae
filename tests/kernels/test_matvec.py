"""A weight times one row: norm, bias, adapter, activation and residual on the way; adapters of several rows; against
the formula in fp64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from pronghorn.kernels.matvec import (
    HANDED_COPIES,
    FourBit,
    RowAdapter,
    RowNorm,
    RowShare,
    adapter_down,
    adapter_up_,
    matvec,
    matvec_4bit,
)
from pronghorn.kernels.nf4 import FourBits
from tests.kernels.compare import IMPLS, RELATIVE, four_bits, random

#: (in, out): a partial tile of rows and of columns; whole tiles; fewer columns than a tile
SHAPES = [(600, 21), (2048, 16), (96, 33), (2056, 18)]


def assert_sums_near(actual, expected, terms, dtype) -> None:
    """fp32 sums of `terms` products, a rounding of the norm's product to 16 bits for the matrix units (its error over
    the sum of |x W|), and one rounding at the end."""
    bound = RELATIVE[dtype] * expected.abs() + 2 * RELATIVE[dtype] * terms + 1e-5 * terms
    difference = (actual.double() - expected).abs()
    assert not actual.isnan().any(), "NaN: memory that nobody wrote, or a wrong formula"
    assert (difference <= bound).all(), f"off by {(difference / bound).max():.2f} times the bound"


def normed(x, norm):
    x = x.double()
    if norm is None:
        return x
    rstd = (x.square().mean(1, keepdim=True) + norm.eps).rsqrt()
    return x * rstd * (norm.weight.double() + norm.offset)


def shared(x, a, b, slots, ends, rank):
    """What the adapters add, row by row."""
    out = torch.zeros(len(x), ends[-1], dtype=torch.float64, device=x.device)
    for i, slot in enumerate(slots.tolist()):
        for p, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            if slot:
                xa = a[slot, p * rank : (p + 1) * rank].double() @ x[i]
                out[i, start:end] = b[slot, start:end].double() @ xa
    return out


def case(rows, width, outs, dtype, device, with_norm=True, parts=1):
    x = random(rows, width, dtype=dtype, device=device)
    norm = RowNorm(random(width, dtype=dtype, device=device, seed=1), 1e-5, 1.0) if with_norm else None
    bias = random(outs, dtype=dtype, device=device, seed=2)
    slots = torch.tensor([i % 3 for i in range(1, rows + 1)], dtype=torch.int32, device=device)
    rank, ends = 16, (*(outs * (p + 1) // parts // 4 * 4 for p in range(parts - 1)), outs)
    a = random(3, parts * rank, width, dtype=dtype, device=device, seed=3, scale=0.1)
    b = random(3, outs, rank, dtype=dtype, device=device, seed=4, scale=0.1)
    return x, norm, bias, slots, a, b, ends


def finished(y, up, activation, residual):
    if activation is not None:
        gate, up = y.chunk(2, 1)
        value = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        y = value * up
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width,outs", SHAPES)
def test_norm_bias_and_residual(impl, dtype, width, outs, device):
    x, norm, bias, *_ = case(1, width, outs, dtype, device)
    weight = random(outs, width, dtype=dtype, device=device, seed=5, scale=0.05)
    residual = random(1, outs, dtype=dtype, device=device, seed=6)
    exact = normed(x, norm)
    expected = exact @ weight.double().t() + bias.double() + residual.double()
    terms = exact.abs() @ weight.double().abs().t()
    out = residual.clone()
    found = matvec(x, [weight], norm=norm, bias=bias, residual=out, impl=impl)
    assert found.data_ptr() == out.data_ptr()
    assert_sums_near(found, expected, terms, dtype)
    plain = matvec(x, [weight], out_dtype=torch.float32, impl=impl)
    assert plain.dtype == torch.float32
    assert_sums_near(
        plain, x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t(), dtype
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_and_adapters(impl, dtype, apart, activation, device):
    width, outs = 130, 24
    x, norm, bias, slots, a, b, _ = case(1, width, outs, dtype, device)
    ends = (outs // 2, outs)
    a = random(3, 32, width, dtype=dtype, device=device, seed=3, scale=0.1)
    weight = random(outs, width, dtype=dtype, device=device, seed=5, scale=0.05)
    exact = normed(x, norm)
    xa = adapter_down(x, a, slots, norm, impl=impl)
    assert xa.dtype == torch.float32 and not xa[slots == 0].any()
    pre = exact @ weight.double().t() + bias.double() + shared(exact, a, b, slots, ends, 16)
    expected = finished(pre, None, activation, None)
    found = matvec(
        x,
        weight.split(outs // 2) if apart else [weight],
        norm=norm,
        bias=bias,
        share=RowShare(xa, b, slots, ends),
        activation=activation,
        impl=impl,
    )
    terms = exact.abs() @ weight.double().abs().t() + 1.0
    gate, up = terms.chunk(2, 1)
    assert_sums_near(found, expected, gate * (1 + up) + up, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [1, 5])
def test_three_parts_with_adapters_of_their_own(impl, rows, device):
    width, dtype = 96, torch.float32
    x, norm, bias, slots, a, b, ends = case(rows, width, 64, dtype, device, parts=3)
    weight = random(64, width, dtype=dtype, device=device, seed=5, scale=0.05)
    exact = normed(x, norm)
    expected = exact @ weight.double().t() + bias.double() + shared(exact, a, b, slots, ends, 16)
    share = RowShare(adapter_down(x, a, slots, norm, impl=impl), b, slots, ends)
    terms = exact.abs() @ weight.double().abs().t() + 1.0
    for parts in ([weight], weight.split([32, 16, 16])) if rows == 1 else ():
        found = matvec(x, parts, norm=norm, bias=bias, share=share, impl=impl)
        assert_sums_near(found, expected, terms, dtype)
    added = adapter_up_((exact @ weight.double().t() + bias.double()).float(), share, impl=impl)
    assert_sums_near(added, expected, exact.abs() @ weight.double().abs().t() + 1.0, dtype)


@pytest.fixture
def small_ones_too(device, monkeypatch):
    """Hopper's matrix units take small weights in 4 bits, too, where their sizes allow it."""
    if device.type == "cuda":
        from pronghorn.kernels.triton import four_bit_row

        monkeypatch.setattr(four_bit_row, "LEAST_NUMBERS", (0, 0, 0))


def quantised(weight, double):
    pytest.importorskip("bitsandbytes")
    bits, _, dense = four_bits(weight, double=double)
    return FourBit(bits, tuple(bits.code.tolist())), dense


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("width", [192, 1088])
@pytest.mark.parametrize("widths", [(24,), (16, 8, 8), (48,), (32, 16, 48)])
@pytest.mark.usefixtures("small_ones_too")
def test_four_bits(impl, double, width, widths, device):
    dtype, outs = torch.bfloat16, sum(widths)
    x, norm, bias, slots, a, b, _ = case(1, width, outs, dtype, device)
    ends = tuple(sum(widths[: i + 1]) for i in range(len(widths)))
    a = random(3, 16 * len(widths), width, dtype=dtype, device=device, seed=3, scale=0.1)
    made = [
        quantised(random(n, width, dtype=torch.float32, device=device, seed=i, scale=0.05), double)
        for i, n in enumerate(widths)
    ]
    weight = torch.cat([dense for _, dense in made])
    exact = normed(x, norm)
    share = RowShare(adapter_down(x, a, slots, norm, impl=impl), b, slots, ends)
    residual = random(1, outs, dtype=dtype, device=device, seed=6)
    expected = exact @ weight.t() + bias.double() + shared(exact, a, b, slots, ends, 16)
    options = {"norm": norm, "bias": bias, "share": share, "impl": impl}
    terms = exact.abs() @ weight.abs().t() + 1.0
    assert_sums_near(matvec_4bit(x, [part for part, _ in made], **options), expected, terms, dtype)
    found = matvec_4bit(x, [part for part, _ in made], residual=residual.clone(), **options)
    assert_sums_near(found, expected + residual.double(), terms, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [192, 1088])
def test_four_bits_with_an_activation(impl, width, device):
    outs, dtype = 12, torch.float32
    x, norm, *_ = case(1, width, 2 * outs, dtype, device)
    made = [
        quantised(random(outs, width, dtype=torch.float32, device=device, seed=i, scale=0.05), True)
        for i in range(2)
    ]
    weight = torch.cat([dense for _, dense in made])
    exact = normed(x, norm)
    expected = finished(exact @ weight.t(), None, "silu", None)
    found = matvec_4bit(x, [part for part, _ in made], norm=norm, activation="silu", impl=impl)
    gate, up = (exact.abs() @ weight.abs().t()).chunk(2, 1)
    assert_sums_near(found, expected, gate * (1 + up) + up, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [4096, 5120])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.usefixtures("small_ones_too")
def test_one_weight_in_four_bits(impl, width, adapter, device):
    """As output projections are multiplied, in whole steps of columns and not: added to the residual, in its place."""
    outs, dtype = 32, torch.bfloat16
    x, _, _, slots, a, b, ends = case(1, width, outs, dtype, device, False)
    part, weight = quantised(random(outs, width, dtype=torch.float32, device=device, scale=0.05), True)
    share = RowShare(adapter_down(x, a, slots, impl=impl), b, slots, ends) if adapter else None
    expected, terms = x.double() @ weight.t(), x.double().abs() @ weight.abs().t() + 1.0
    if adapter:
        expected += shared(x.double(), a, b, slots, ends, 16)
    for kind in (dtype, torch.float32):
        residual = random(1, outs, dtype=kind, device=device, seed=6)
        out = residual.clone()
        found = matvec_4bit(x, [part], share=share, residual=out, impl=impl)
        assert found.data_ptr() == out.data_ptr() and found.dtype == kind
        assert_sums_near(out, expected + residual.double(), terms, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("outs, activation", [(24, "silu"), (8, "gelu_tanh")])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.usefixtures("small_ones_too")
def test_gate_and_up_in_four_bits(impl, double, outs, activation, adapter, device):
    """In whole steps of columns; groups of outputs that do not share out evenly."""
    width, dtype = 2048, torch.bfloat16
    x, norm, bias, slots, _, b, _ = case(1, width, 2 * outs, dtype, device)
    made = [
        quantised(random(outs, width, dtype=torch.float32, device=device, seed=i, scale=0.05), double)
        for i in range(2)
    ]
    weight = torch.cat([dense for _, dense in made])
    parts, exact = [part for part, _ in made], normed(x, norm)
    y = exact @ weight.t() + bias.double()
    options = {"norm": norm, "bias": bias, "activation": activation, "impl": impl}
    if adapter:
        a = random(3, 32, width, dtype=dtype, device=device, seed=3, scale=0.01)
        options["share"] = RowShare(adapter_down(x, a, slots, norm, impl=impl), b, slots, (outs, 2 * outs))
        y += shared(exact, a, b, slots, (outs, 2 * outs), 16)
    gate, up = (exact.abs() @ weight.abs().t() + bias.double().abs() + 1.0).chunk(2, 1)
    terms = gate * (1 + up) + up
    assert_sums_near(matvec_4bit(x, parts, **options), finished(y, None, activation, None), terms, dtype)
    residual = random(1, outs, dtype=dtype, device=device, seed=6)
    found = matvec_4bit(x, parts, residual=residual.clone(), **options)
    assert_sums_near(found, finished(y, None, activation, residual), terms, dtype)


@pytest.mark.parametrize(
    "widths, width, activation, taken",
    [
        ((14336, 14336), 4096, "silu", True),
        ((4096, 1024, 1024), 4096, None, True),
        ((4096,), 4096, None, True),
        ((4096,), 14336, None, True),
        ((8960, 8960), 1536, "silu", False),  # few numbers
        ((1536, 256, 256), 1536, None, False),
        ((2048,), 4096, None, False),
        ((5120,), 5120, None, False),  # more outputs than run at once
        ((28672,), 4096, "silu", False),  # gate and up in one
        ((4104,), 14336, None, False),  # no whole sets
        ((4096,), 4128, None, False),  # no whole blocks
        ((4096,), 1 << 17, None, False),  # shared memory
    ],
)
def test_which_4_bit_rows_hoppers_matrix_units_take(widths, width, activation, taken, monkeypatch):
    row = pytest.importorskip("pronghorn.kernels.triton.four_bit_row")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def fits(dtype=torch.bfloat16):
        x = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, width), device="cuda")
        empty = torch.empty(0, dtype=torch.uint8)
        numbers = tuple(i / 15 for i in range(16))
        parts = [FourBit(FourBits(empty, empty, empty, 64, (rows, width)), numbers) for rows in widths]
        return row.fits(x, parts, activation)

    assert fits() == taken and not fits(torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert not fits()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.usefixtures("small_ones_too")
def test_what_is_no_number_shows_in_four_bits(impl, wrong, with_norm, device):
    x, norm, *_ = case(1, 1088, 32, torch.bfloat16, device, with_norm)
    part, _ = quantised(random(32, 1088, dtype=torch.float32, device=device, scale=0.05), True)
    assert matvec_4bit(x, [part, part], norm=norm, impl=impl).isfinite().all()
    x[0, 77] = wrong
    assert not matvec_4bit(x, [part, part], norm=norm, impl=impl).isfinite().any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("outlier", [1.0, 100.0, 30000.0])
@pytest.mark.usefixtures("small_ones_too")
def test_one_large_number_leaves_the_others_their_share_in_four_bits(impl, outlier, device):
    """By the length of x no more is lost than its rounding to bf16 would cost."""
    x, *_ = case(1, 2048, 64, torch.bfloat16, device, False)
    x[0, 1234] = outlier
    part, weight = quantised(random(64, 2048, dtype=torch.float32, device=device, scale=0.05), True)
    found = matvec_4bit(x, [part, part], out_dtype=torch.float32, impl=impl).double()[:, :64]
    expected = x.double() @ weight.t()
    assert ((found - expected).abs() <= 2**-9 * x.double().norm() * weight.norm(dim=1)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("four_bits_", [False, True])
@pytest.mark.parametrize(
    "widths,activation,dtype",
    [
        ((24,), None, torch.float32),
        ((16, 8, 8), None, torch.float32),
        ((12, 12), "silu", torch.float32),
        ((32,), None, torch.bfloat16),
        ((48, 16, 32), None, torch.bfloat16),
        ((16, 16), "silu", torch.bfloat16),
    ],
)
@pytest.mark.usefixtures("small_ones_too")
def test_adapter_in_the_weights_launch(impl, four_bits_, widths, activation, dtype, device):
    """Three rows after each other with the same scratch; the second row has no adapter."""
    width, outs, parts = 1088, sum(widths), len(widths)
    ends = tuple(sum(widths[: i + 1]) for i in range(parts))
    _, norm, _, _, _, b, _ = case(1, width, outs, dtype, device)
    a = random(3, parts * 16, width, dtype=dtype, device=device, seed=3, scale=0.1)
    weights = [random(n, width, dtype=dtype, device=device, seed=i, scale=0.05) for i, n in enumerate(widths)]
    if four_bits_:
        made = [quantised(weight, True) for weight in weights]
        four, weights = [part for part, _ in made], [dense for _, dense in made]
    weight = torch.cat(weights)
    handed = torch.zeros(HANDED_COPIES, parts * 16, dtype=torch.int64, device=device)
    turn = torch.zeros(1, dtype=torch.int32, device=device)
    for seed, slot in enumerate((1, 0, 2)):
        turn += 1
        x = random(1, width, dtype=dtype, device=device, seed=10 + seed)
        slots = torch.tensor([slot], dtype=torch.int32, device=device)
        share = RowAdapter(a, b, slots, ends, handed, turn)
        options = {"norm": norm, "share": share, "activation": activation, "impl": impl}
        found = matvec_4bit(x, four, **options) if four_bits_ else matvec(x, weights, **options)
        exact = normed(x, norm)
        y = exact @ weight.double().t() + shared(exact, a, b, slots, ends, 16)
        terms = exact.abs() @ weight.double().abs().t() + exact.abs().sum()
        if activation is not None:
            gate, up = terms.chunk(2, 1)
            terms = gate * (1 + up) + up
        assert_sums_near(found, finished(y, None, activation, None), terms, dtype)
