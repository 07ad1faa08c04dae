"""A gated unit made inside the products around it gives what it gives apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.blocks import LEVELS, gated_products
from pronghorn.engine import binding_of
from pronghorn.kernels import glu_products, tiles
from tests.blocks.inside import EXACT, outcomes
from tests.families.parity import (
    add_adapter,
    assert_same,
    bound_copy,
)
from tests.tiny import tiny_model

#: the GPU's kernels are compared in tests/kernels/test_glu_products.py
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels on a CPU's tensors")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The formulas in torch take the kernels' place; how often each was called."""
    monkeypatch.setattr(tiles, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(tiles, "fills", lambda *sizes: True)
    monkeypatch.setattr("pronghorn.kernels.lora.fits_kernels", lambda *args, **kwargs: True)
    found: dict[str, int] = {}

    def counted(name: str) -> None:
        right = getattr(glu_products, name)

        def count(call: Any, **options: Any) -> Any:
            found[name] = found.get(name, 0) + 1
            return right(call, **options)

        monkeypatch.setattr(glu_products, name, count)

    for name in ("gate_up_act", "gate_up", "down_backward_"):
        counted(name)
    return found


@pytest.mark.parametrize("tile_rows", [None, 128])
@pytest.mark.parametrize("level", LEVELS)
def test_every_level(
    level: str, tile_rows: int | None, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_adapter(tiny_model("qwen3", dtype=torch.float64), r=8, lora_alpha=12)
    inside, apart = outcomes("GATED_IN_PRODUCTS", model, level, monkeypatch, tile_rows)
    assert_same(inside, apart, EXACT)
    keeps = level in ("matmuls", "offload-matmuls", "all")
    assert calls["gate_up_act"] and calls["down_backward_"] and bool(calls.get("gate_up")) != keeps


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({"r": 8, "target_modules": ["gate_proj", "up_proj"]}, {"gate_up_act"}),
        ({"r": 8, "target_modules": ["q_proj", "down_proj"]}, {"gate_up_act", "down_backward_"}),
        ({"r": 8, "rank_pattern": {"down_proj": 4}}, {"gate_up_act"}),
        ({"r": 8, "rank_pattern": {"down_proj": 64}}, {"gate_up_act"}),
        ({"r": 8, "rank_pattern": {"up_proj": 16}}, set()),
        ({"r": 8, "alpha_pattern": {"up_proj": 16}}, set()),
        ({"r": 4}, set()),
        ({"r": 8, "target_modules": ["up_proj", "down_proj"]}, set()),
        ({"r": 8, "use_dora": True}, set()),
        ({"r": 8, "lora_dropout": 0.1}, set()),
    ],
)
def test_other_adapters(
    options: dict[str, Any], used: set[str], calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_adapter(tiny_model("llama", dtype=torch.float64), lora_alpha=8, **options)
    inside, apart = outcomes("GATED_IN_PRODUCTS", model, "all", monkeypatch)
    if "lora_dropout" not in options:
        assert_same(inside, apart, EXACT)
    assert set(calls) == used


def test_all_weights_trained(calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    inside, apart = outcomes("GATED_IN_PRODUCTS", model, "attention", monkeypatch, step=False)
    assert_same(inside, apart, EXACT)
    assert set(calls) == {"gate_up_act", "gate_up"}


def test_one_matrix_and_biases_go_apart(calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (
        add_adapter(tiny_model("phi3", dtype=torch.float64), r=8),
        add_adapter(tiny_model("llama", dtype=torch.float64, mlp_bias=True), r=8),
    ):
        inside, apart = outcomes("GATED_IN_PRODUCTS", model, "all", monkeypatch)
        assert_same(inside, apart, EXACT)
    assert not calls


def test_a_cpu_has_no_such_kernels() -> None:
    model = add_adapter(tiny_model("llama", dtype=torch.bfloat16), r=8)
    binding = binding_of(bound_copy(model))
    assert binding is not None
    assert tiles.why_not(torch.device("cpu"), torch.bfloat16) is not None
    groups = binding.all_groups()
    from pronghorn.blocks import ProjectionGroup

    group = ProjectionGroup(groups[0, 4])
    assert not gated_products.takes_gate_up(group, torch.zeros(8, 8), torch.bfloat16)


@pytest.mark.parametrize("level", ["attention", "matmuls"])
def test_tiles_and_all_rows_may_differ(
    level: str, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows leave processors idle: what was made complete by all rows is taken apart by tiles, and the other way."""
    model = add_adapter(tiny_model("qwen3", dtype=torch.float64), r=8)
    for most in (True, False):
        monkeypatch.setattr(tiles, "fills", lambda rows, *sizes, most=most: (rows > 128) == most)
        inside, apart = outcomes("GATED_IN_PRODUCTS", model, level, monkeypatch, 128)
        assert_same(inside, apart, EXACT)


def test_how_many_processors_have_a_tile() -> None:
    assert tiles.fills(8192, 14336, 128) and tiles.fills(8192, 14336, 256)
    assert tiles.fills(2048, 8960, 128) and tiles.fills(2048, 8960, 256)
    assert not tiles.fills(0, 8960, 128)
    assert not tiles.fills(512, 8960, 128) and not tiles.fills(512, 8960, 256)


def test_how_many_rows_a_tile_has() -> None:
    """Three groups where the last round of tiles is nearly as full as with two."""
    assert tiles.groups_of(8192, 14336, glu_products.HALF) == 3
    assert (
        tiles.groups_of(2048, 14336, glu_products.HALF) == tiles.groups_of(1, 14336, glu_products.HALF) == 2
    )


def test_a_model_says_so(calls: dict[str, int]) -> None:
    fits, other = (
        bound_copy(add_adapter(tiny_model("llama", dtype=torch.bfloat16), r=rank)) for rank in (8, 4)
    )
    assert "gated units: in the products around them" in binding_of(fits).describe()  # type: ignore[union-attr]
    assert "gated units" not in binding_of(other).describe()  # type: ignore[union-attr]
