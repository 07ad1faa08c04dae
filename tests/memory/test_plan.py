"""Plans fit, are the fastest that do, and say what to change where none does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pronghorn.blocks import LEVELS, Level
from pronghorn.blocks.glu import tile_slices
from pronghorn.errors import BudgetInvalid, BudgetTooSmall
from pronghorn.memory import (
    Batch,
    ModelShape,
    estimate,
    longest_that_fits,
    parse_budget,
    plan,
    plan_if_it_fits,
    rates_of,
    with_margin,
)
from pronghorn.memory.cost import step_time
from pronghorn.memory.plan import leanest
from pronghorn.memory.products import Products
from tests.memory.test_estimate import LLAMA_8B, QWEN_1_5B

GIB = 2**30
LLAMA, QLORA = ModelShape(**LLAMA_8B), ModelShape(**LLAMA_8B, storage="nf4 double")
QWEN = ModelShape(**QWEN_1_5B)
ROWS = Batch(8192, 8188, 4)


@pytest.mark.parametrize("gib", [17.5, 24, 32, 40, 80])
def test_a_plan_keeps_its_budget_and_more_memory_is_never_slower(gib: float) -> None:
    found, richer = (plan(LLAMA, int(size * GIB), ROWS) for size in (gib, gib + 2))
    assert found.estimate.reserved <= gib * GIB
    assert found.estimate.reserved == estimate(LLAMA, found.levels, ROWS, tile_rows=found.tile_rows).reserved
    assert richer.time.total <= found.time.total * 1.005


def test_no_level_for_all_layers_that_fits_is_faster() -> None:
    for gib in (17.5, 24.0, 32.0):
        found = plan(LLAMA, int(gib * GIB), ROWS)
        for level in LEVELS:
            if estimate(LLAMA, level, ROWS).reserved <= gib * GIB:
                time = step_time(LLAMA, (level,) * 32, ROWS, rates_of("H200"))
                assert found.time.total <= time.total * 1.005, level


def test_everything_is_kept_where_it_fits() -> None:
    found = plan(LLAMA, 80 * GIB, ROWS)
    assert set(found.levels) == {"all"} and found.estimate.host == 0 and found.time.recompute_share < 0.01


@pytest.mark.parametrize(
    ("shape", "batch", "gib"),
    [(LLAMA, ROWS, 17.5), (QLORA, Batch(4096, 4094, 2), 7.0), (QWEN, Batch(2048, 2046, 2), 3.6)],
)
def test_forty_per_cent_less_recomputation_than_full_checkpointing(
    shape: ModelShape, batch: Batch, gib: float
) -> None:
    """In about the memory that keeping layer inputs alone takes, reserved by torch."""
    found = plan(shape, int(gib * GIB), batch)
    assert found.time.recompute_share <= 0.6
    assert gib * GIB < estimate(shape, "none", batch).reserved * 1.02


def test_heavy_layers_stand_last_and_parked_ones_alternate() -> None:
    found = plan(QWEN, int(3.9 * GIB), Batch(2048, 2046, 2))
    depth = [0 if level.startswith("offload") else LEVELS.index(level) for level in found.levels]
    assert depth == sorted(depth) and len(found.by_level) > 2
    parked = [level for level in found.levels if level.startswith("offload")]
    assert max(len(run) for run in "".join("x" if p == "offload" else " " for p in parked).split()) <= 2


def test_host_memory_is_limited() -> None:
    free = plan(LLAMA, 20 * GIB, ROWS)
    tight = plan(LLAMA, 20 * GIB, ROWS, host_limit=4 * GIB)
    assert free.estimate.host > 4 * GIB >= tight.estimate.host > 0
    assert tight.time.total > free.time.total
    none = plan(LLAMA, 20 * GIB, ROWS, offload=False)
    assert none.estimate.host == 0 and not any(level.startswith("offload") for level in none.levels)


def test_a_slow_link_is_not_waited_for() -> None:
    slow = replace(rates_of("H200"), link=2e9)
    found = plan(LLAMA, 24 * GIB, ROWS, rates=slow)
    assert found.time.waiting < 0.1 * found.time.total


def test_the_longest_step_fits_and_a_longer_one_does_not() -> None:
    rates, batch = rates_of("RTX 4090"), Batch(65536, 65535, 1)
    budget = int(23.2 * GIB)
    longest = longest_that_fits(QLORA, budget, batch, rates)
    assert longest > 3 * 81920, "more than a peer fails with in this memory, three times over"
    assert leanest(QLORA, Batch(longest, longest - 1, 1), rates).reserved <= budget
    more = int(longest * 1.04)
    assert leanest(QLORA, Batch(more, more - 1, 1), rates).reserved > budget
    assert longest_that_fits(QLORA, 4 * GIB, batch, rates) == 0
    on_device = longest_that_fits(QLORA, budget, batch, rates, offload=False)
    assert 0 < on_device < longest / 2
    assert longest_that_fits(QLORA, budget, batch, rates, host_limit=GIB) == on_device


@pytest.mark.parametrize(
    ("shape", "batch", "gib", "said"),
    [
        (
            LLAMA,
            ROWS,
            12,
            r"the model alone takes 15\.\d+ GiB\. Fix: load in 4 bits, which takes 6\.\d+ GiB, or",
        ),
        (LLAMA, ROWS, 16.4, r"give a step at most [\d,]+ tokens \(a batch of \d rows? of 2,048\), or raise"),
        (LLAMA, ROWS, 5, r"Fix: raise the budget to 16\.\d+ GiB"),
        (QLORA, Batch(500_000, 499_999, 1), 23.2, r"at most 4\d\d,\d+ tokens, or raise the budget to"),
    ],
)
def test_what_does_not_fit_is_told_with_a_way_out(
    shape: ModelShape, batch: Batch, gib: float, said: str
) -> None:
    with pytest.raises(BudgetTooSmall, match=said):
        plan(shape, int(gib * GIB), batch)


def test_too_little_host_memory_is_told_as_that() -> None:
    said = (
        r"only with 1\.5\d GiB of pinned host memory, of which 1\.00 GiB may be .* raise the budget to 6\.9\d"
    )
    with pytest.raises(BudgetTooSmall, match=said):
        plan(replace(QLORA, layers=4), int(6.7 * GIB), Batch(50_000, 49_999, 1), host_limit=GIB)


def test_budgets() -> None:
    assert parse_budget("17.5GiB") == int(17.5 * GIB)
    assert parse_budget("24 GB") == 24 * 10**9 and parse_budget("800MiB") == 800 * 2**20
    assert parse_budget("8g") == 8 * 10**9 and parse_budget(123) == 123
    assert 22 * GIB < parse_budget("auto", free=24 * GIB) < 24 * GIB
    for wrong in ("", "GiB", "-3GiB", "0GiB", "much", "17.5", -1, 0, True):
        with pytest.raises(BudgetInvalid):
            parse_budget(wrong)
    with pytest.raises(BudgetInvalid, match="needs a GPU"):
        parse_budget("auto")


def test_rates_by_name() -> None:
    assert rates_of("NVIDIA H200").name == "H200" and rates_of("NVIDIA L40S").name == "L40S"
    assert rates_of("NVIDIA L4").name == "L4" and rates_of("something new").name == "4090"


def test_tiles_that_are_alike_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(30_000, 29_999, 1)
    levels: list[Level] = ["offload", "offload-attention", "attention", "none"]
    few = replace(QLORA, layers=4)
    short = estimate(few, levels, batch, tile_rows=512)
    monkeypatch.setattr(Products, "_tiles", lambda self: tile_slices(self.tokens, self.tile_rows))
    assert short == estimate(few, levels, batch, tile_rows=512)


def test_a_tight_plan_counts_four_bits_in_common_buffers() -> None:
    """What is apart is rounded: tensors below 1 MiB come from segments of 2 MiB, those below 10 from 20."""
    shape = replace(QWEN, storage="nf4")
    batch, rates = Batch(2048, 2048, 2), rates_of("H200")
    apart, together = (
        leanest(replace(shape, gathered=gathered), batch, rates).reserved for gathered in (False, True)
    )
    assert 16 * 2**20 < apart - together < 32 * 2**20
    assert plan_if_it_fits(shape, with_margin(together, shape), batch, rates=rates) is not None
    assert (
        plan_if_it_fits(replace(shape, gathered=False), with_margin(together, shape), batch, rates=rates)
        is None
    )
    # Where there is room for everything nothing moves.
    found = plan(shape, 64 * GIB, batch, rates=rates)
    assert found.estimate.reserved == estimate(replace(shape, gathered=False), "all", batch).reserved
