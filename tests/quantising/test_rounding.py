"""NF4's grid, rounding onto it, and the choice under a budget, against brute force and bitsandbytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from pronghorn.quantising.choice import Option, choose
from pronghorn.quantising.formats import (
    Format,
    Scales,
    dense_form,
    forms_of,
    nearest,
    nf4_values,
    plain_form,
    spread,
    store_scales,
)
from pronghorn.quantising.measure import errors_of, row_errors
from pronghorn.quantising.rounding import OutputFit, damping, inverse_factor, round_plain, search_scales


def correlated(tokens: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """X [T, in] with strong correlations and an outlier channel, and XᵀX / T."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.linspace(2, 0.05, width)
    x = torch.randn(tokens, width, generator=generator) @ mixing
    x[:, 1] *= 10
    return x, x.t() @ x / tokens


def gaussian(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_plain_rounding_and_its_storage_are_bitsandbytes_own(blocksize, double):
    weight = gaussian(24, 128)
    stored = round_plain(weight, Format(blocksize, double))
    packed, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=double, quant_type="nf4")
    expected = dequantize_4bit(packed, state)
    # A double-quantised scale is another one than the block was divided by: bitsandbytes rounds to the first.
    unlike = (stored.dense() != expected).float().mean()
    assert unlike == 0 if not double else unlike < 0.02
    ours, our_state = stored.pack(torch.float32)
    assert torch.equal(dequantize_4bit(ours, our_state), stored.dense())
    sizes = [ours.nbytes, our_state.absmax.nbytes, our_state.code.nbytes]
    if double:
        second = our_state.state2
        sizes += [second.absmax.nbytes, second.code.nbytes]
    assert Format(blocksize, double).nbytes((24, 128)) == sum(sizes)


def test_blocks_may_cross_rows_and_end_early():
    weight = gaussian(5, 40)  # 200 weights: three blocks of 64 and one of 8
    stored = round_plain(weight, Format(64, double=False))
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(stored.dense(), dequantize_4bit(packed, state).view_as(weight))
    assert stored.scales.values.numel() == 4


def test_forms_have_whole_blocks_in_a_row():
    assert [form.blocksize for form in forms_of(576, True)] == [64, 32]
    assert [form.blocksize for form in forms_of(1536, True)] == [128, 64, 32]
    assert [form.blocksize for form in forms_of(40, True)] == [64]
    assert (
        plain_form(False).nbytes((64, 64)) == 2048 + 64 * 4 + 64
        and dense_form(torch.bfloat16).nbytes((4, 8)) == 64
    )


def test_nearest_is_nearest_at_boundaries_too():
    values = nf4_values(torch.device("cpu"))
    middles = (values[1:] + values[:-1]) / 2
    around = torch.cat([middles, middles.nextafter(torch.tensor(2.0)), middles.nextafter(torch.tensor(-2.0))])
    edges = torch.arange(65) / 32 - 1
    x = torch.cat([gaussian(40000) * 12, values, around, edges, torch.tensor([-9.0, 9.0, torch.inf])])
    assert torch.equal(nearest(x), torch.bucketize(x, middles))  # many
    assert torch.equal(nearest(x[-200:]), torch.bucketize(x[-200:], middles))


def test_scales_are_the_best_of_those_tried():
    weight, importance = gaussian(4, 64), torch.linspace(0.1, 3, 64)
    found = search_scales(weight, importance, 32)
    values = nf4_values(weight.device)

    def cost(block, scales):
        part, heavy = weight.view(-1, 32)[block], importance.view(-1, 32)[block % 2]
        return float((heavy * (part - values[nearest(part / scales)] * scales).square()).sum())

    for block, scale in enumerate(found):
        largest = weight.view(-1, 32)[block].abs().max()
        assert 0.79 * largest <= scale <= 1.05 * largest
        assert cost(block, scale) <= cost(block, largest) + 1e-12


def test_factor_is_the_inverse_s():
    _, moment = correlated(256, 24)
    factor = inverse_factor(moment).double()
    damped = (moment + damping(moment) * torch.eye(24)).double()
    assert torch.allclose(factor.t() @ factor @ damped, torch.eye(24, dtype=torch.double), atol=2e-3)
    assert torch.equal(factor, factor.triu())


def test_rounding_to_the_output_against_brute_force():
    """Over all 16^3 codings of a row: ours is near the best, and plain rounding far from it."""
    x = torch.randn(512, 3, generator=torch.Generator().manual_seed(0))
    x = x + 2 * x[:, :1]  # what all have in common
    moment = x.t() @ x / 512
    values, ratios = nf4_values(x.device), []
    every = torch.tensor(list(itertools.product(range(16), repeat=3)))
    form = Format(64, double=False)
    for seed in range(12):
        weight = gaussian(1, 3, seed=seed)
        scales = Scales(weight.abs().max().view(1), weight.abs().max().view(1))
        ours = OutputFit(moment).round_with([weight], [scales], [form])[0].dense()
        plain = values[nearest(weight / scales.values)] * scales.values
        best = min(float(row_errors(weight - q[None], moment)) for q in values[every] * scales.values)
        ratios.append([float(row_errors(weight - q, moment)) / best for q in (ours, plain)])
    ours_mean, plain_mean = torch.tensor(ratios).log().mean(0).exp()
    assert ours_mean < 1.5 and plain_mean > 1.5 * ours_mean


def test_rounding_to_the_output_is_better_where_inputs_are_correlated():
    x, moment = correlated(2048, 128)
    weight = gaussian(32, 128)
    for form in (Format(64), Format(32)):
        plain = errors_of(weight, round_plain(weight, form).dense(), moment)
        fitted = errors_of(weight, OutputFit(moment).round([weight], [form])[0].dense(), moment)
        assert fitted.output < 0.4 * plain.output
        assert fitted.weight > plain.weight  # what it pays with
    # The same of outputs themselves.
    dense = OutputFit(moment).round([weight], [Format(64)])[0].dense()
    off = (x @ (weight - dense).t()).square().sum() / (x @ weight.t()).square().sum()
    assert errors_of(weight, dense, moment).output == pytest.approx(float(off), rel=1e-3)


def test_weights_that_are_rounded_together_are_as_alone():
    _, moment = correlated(512, 128)
    weights, forms = [gaussian(8, 128, seed=7), gaussian(24, 128, seed=8)], [Format(32), Format(128)]
    fit = OutputFit(moment)
    for stored, weight, form in zip(fit.round(weights, forms), weights, forms, strict=True):
        (alone,) = fit.round([weight], [form])
        assert (stored.indices != alone.indices).float().mean() < 0.01  # products sum in another order
        assert torch.equal(stored.scales.stored, alone.scales.stored) and stored.form == form


def test_rounding_survives_inputs_that_never_came_and_blocks_of_zeros():
    moment = torch.zeros(64, 64)
    moment[0, 0] = 4.0
    weight = gaussian(4, 64)
    weight[2] = 0
    for given in (moment, torch.zeros(64, 64)):
        dense = OutputFit(given).round([weight], [Format(64)])[0].dense()
        assert dense.isfinite().all() and not dense[2].any()
    assert errors_of(torch.zeros(4, 64), torch.zeros(4, 64), moment).output == 0.0


def test_stored_scales_are_what_dequantisation_gives():
    wanted = gaussian(700).abs()
    scales = store_scales(wanted, Format(64))
    assert scales.stored.dtype == torch.uint8 and (scales.values - wanted).abs().max() < 0.02 * wanted.max()
    assert spread(wanted, (10, 4480), 64).shape == (10, 4480)


def brute(options, budget):
    best = None
    for choice in itertools.product(*[range(len(module)) for module in options]):
        if sum(m[i].nbytes for m, i in zip(options, choice, strict=True)) <= budget:
            harm = sum(m[i].harm for m, i in zip(options, choice, strict=True))
            best = harm if best is None else min(best, harm)
    return best


def test_choice_against_brute_force():
    generator = torch.Generator().manual_seed(5)
    for _ in range(40):
        options = [
            [
                Option(
                    int(torch.randint(1, 60, (1,), generator=generator)),
                    float(torch.rand(1, generator=generator)),
                )
                for _ in range(3)
            ]
            for _ in range(5)
        ]
        budget = int(torch.randint(20, 260, (1,), generator=generator))
        found, best = choose(options, budget), brute(options, budget)
        if best is None:
            assert found is None
            continue
        assert found is not None
        assert sum(m[i].nbytes for m, i in zip(options, found, strict=True)) <= budget
        assert sum(m[i].harm for m, i in zip(options, found, strict=True)) == pytest.approx(best)


def test_choice_of_many_large_modules_keeps_the_budget_and_spends_it():
    generator = torch.Generator().manual_seed(6)
    sizes = torch.randint(10**6, 10**8, (300,), generator=generator).tolist()
    options = [
        [Option(size // 2, float(torch.rand(1, generator=generator))), Option(2 * size, 0.0)]
        for size in sizes
    ]
    least = sum(module[0].nbytes for module in options)
    budget = int(1.1 * least)
    found = choose(options, budget)
    assert found is not None
    spent = sum(m[i].nbytes for m, i in zip(options, found, strict=True))
    assert 0.995 * budget < spent <= budget
