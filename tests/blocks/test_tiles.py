"""The GLU block over tiles of rows gives what it gives over all rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pronghorn.blocks import LEVELS, GluBlock, Norm, ProjectionGroup
from pronghorn.blocks.glu import TILE_ROWS, tile_slices
from pronghorn.blocks.levels import ROOMY_TILES
from pronghorn.blocks.projection import LinearProjection
from pronghorn.engine import bind, binding_of
from pronghorn.weights import DenseWeight
from tests.families.parity import add_adapter, assert_same, bound_copy, packed_batch, rows_batch, run
from tests.tiny import tiny_model

EXACT = 5e-6  # as in the family tests: fp64 models, RMSNorm's statistics in fp64, the loss's sums in fp64
LENGTHS = (100, 7, 120, 90)


def tiled_copy(model: Any, level: str, rows: int | None) -> Any:
    fast = bound_copy(model, level)
    binding = binding_of(fast)
    assert binding is not None
    binding.tile_rows = rows
    return fast


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_tiles_change_no_gradient(level: str, mode: str) -> None:
    model = tiny_model("qwen3", dtype=torch.float64)
    if mode == "lora":
        model = add_adapter(model)
    batch = packed_batch(rows_batch(model.config.vocab_size, LENGTHS))
    expected = run(tiled_copy(model, level, None), batch, logits=False)
    assert_same(run(tiled_copy(model, level, 128), batch, logits=False), expected, EXACT)


@pytest.mark.parametrize("level", ["none", "attention", "matmuls"])
def test_adapter_dropout_draws_the_same_masks(level: str) -> None:
    """Masks are functions of a row's number: such a block is not cut."""
    model = add_adapter(tiny_model("llama", dtype=torch.float64), lora_dropout=0.3)
    batch = packed_batch(rows_batch(model.config.vocab_size, LENGTHS))
    outcomes = []
    for rows in (None, 128):
        fast = tiled_copy(model, level, rows)
        torch.manual_seed(0)
        outcomes.append(run(fast, batch, logits=False))
    assert_same(outcomes[1], outcomes[0], 0.0)


def block(dtype: torch.dtype, trained: bool, tile_rows: int) -> GluBlock:
    def group(*shapes: tuple[int, int]) -> ProjectionGroup:
        weights = [torch.randn(shape, dtype=dtype, requires_grad=trained) for shape in shapes]
        return ProjectionGroup([LinearProjection(DenseWeight(weight)) for weight in weights])

    return GluBlock(
        Norm(torch.ones(8, dtype=dtype), 1e-6, 0.0),
        group((16, 8), (16, 8)),
        group((8, 16)),
        "silu",
        tile_rows,
    )


def test_tiles_cover_all_rows_at_about_equal_height() -> None:
    tiles = block(torch.float32, False, 1000).tiles(2100)
    heights = [at.stop - at.start for at in tiles]
    assert tiles[0].start == 0 and [at.start for at in tiles[1:]] == [at.stop for at in tiles[:-1]]
    assert sum(heights) == 2100 and max(heights) <= 1000 and all(h % 128 == 0 for h in heights[:-1])


def test_a_batch_longer_than_any_planned_has_tiles_of_the_usual_height() -> None:
    assert tile_slices(TILE_ROWS, ROOMY_TILES) == [slice(0, TILE_ROWS)]
    assert tile_slices(65536, ROOMY_TILES) == tile_slices(65536, TILE_ROWS)


def test_gradients_in_16_bits_are_not_summed_over_tiles() -> None:
    assert len(block(torch.bfloat16, False, 256).tiles(1024)) == 4
    assert len(block(torch.bfloat16, True, 256).tiles(1024)) == 1
    assert len(block(torch.float32, True, 256).tiles(1024)) == 4


def test_wide_tensors_exist_for_one_tile_at_a_time() -> None:
    """Live bytes while a layer runs forward and backward: what T rows of gate, up and act would take is never there."""
    from tests.memory.live import peak_of

    model = add_adapter(tiny_model("llama", num_hidden_layers=1, intermediate_size=1024))
    batch = packed_batch(rows_batch(model.config.vocab_size, (256,) * 4))
    peaks = {}
    for rows in (None, 128):
        fast = copy.deepcopy(model)
        bind(fast, save_levels="none")
        binding_of(fast).tile_rows = rows  # type: ignore[union-attr]
        peaks[rows] = peak_of(lambda fast=fast: fast(**batch, use_cache=False).loss.backward())  # type: ignore[misc]
    wide = 1024 * 1024 * 4
    assert peaks[None] > 3 * wide and peaks[128] < 2 * wide
