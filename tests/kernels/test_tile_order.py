"""Every tile is one program's, partial sums of a row lie one behind the other, and no order costs a round more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pronghorn.kernels import glu_products
from pronghorn.kernels.tiles import order_of

gluon_parts = pytest.importorskip("pronghorn.kernels.triton.gluon_parts")


def walked(rows: int, across: int, most: int, together: int, monkeypatch: pytest.MonkeyPatch) -> list[list]:
    """(row, column, slab, whether the sum is written) of each program's tiles, by the functions that kernels call."""
    order, programs = order_of(rows, across, most, together), []
    for number in range(order.programs):
        as_on_a_gpu = SimpleNamespace(
            program_id=lambda axis, number=number: number, where=lambda c, a, b: a if c else b, maximum=max
        )
        monkeypatch.setattr(gluon_parts, "gl", as_on_a_gpu)
        own, count, turn = gluon_parts.dealt.fn(rows, across, order.programs, order.rest, together)
        tiles = []
        for i in range(count):
            row, column = gluon_parts.nth_tile.fn(
                i, own, turn, rows, across, order.programs, order.rest, together
            )
            slab, last = gluon_parts.slab_of.fn(
                i, own, count, turn, column, rows, across, order.programs, order.period, order.rest, together
            )
            tiles.append((row, column, slab, bool(last)))
        programs.append(tiles)
    return programs


SIZES = [
    (43, 112, 132, 11),  # 8B, forward: 8,192 tokens
    (56, 64, 132, 12),  # and backward
    (11, 70, 132, 11),
    (7, 112, 132, 11),
    (16, 112, 132, 16),
    (70, 16, 132, 16),
    (40, 30, 114, 12),
    (23, 9, 132, 11),
    (3, 2, 132, 12),
    (1, 1, 132, 11),
    (13, 1, 132, 12),
]


@pytest.mark.parametrize("rows,across,most,together", SIZES)
def test_each_tile_is_one_program_s(
    rows: int, across: int, most: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = walked(rows, across, most, together, monkeypatch)
    tiles = [tile[:2] for program in programs for tile in program]
    assert sorted(tiles) == [(row, column) for row in range(rows) for column in range(across)]
    # Groups of warps wait for a first tile.
    assert all(programs)
    assert max(map(len, programs)) == -(-rows * across // len(programs))


@pytest.mark.parametrize("rows,across,most,together", SIZES)
def test_sums_of_a_row_lie_one_behind_the_other(
    rows: int, across: int, most: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, rest, until = order_of(rows, across, most, together).sums(rows, across, 64)
    written: dict[int, list[int]] = {row: [] for row in range(rows)}
    for program in walked(rows, across, most, together, monkeypatch):
        held = None
        for row, _, slab, last in program:
            assert held in (None, (row, slab))
            held = None if last else (row, slab)
            if last:
                written[row].append(slab)
        assert held is None
    for row, slabs in written.items():
        assert sorted(slabs) == list(range(first if row * 64 < until else rest))


def test_the_rest_stays_in_its_rows_where_that_takes_no_round_more() -> None:
    assert order_of(43, 112, 132, 11).sums(43, 112, 192) == (12, 13, 33 * 192)
    assert order_of(56, 64, 132, 12).sums(56, 64, 256) == (11, 16, 48 * 256)
    assert order_of(7, 112, 132, 11).sums(7, 112, 192) == (0, 112, 0)


def test_partial_sums_depend_on_the_processors() -> None:
    """Plans count them for the GPU that is there: 114 processors are no multiple of 11 rows, or of 12 columns."""
    assert glu_products.forward_tiling(8192, 14336).sums.most == 13
    assert glu_products.forward_tiling(8192, 14336, 114).sums.most == 112
    assert glu_products.backward_tiling(8192, 14336).sums.most == 32
    assert glu_products.backward_tiling(8192, 14336, 114).sums.most == 128
