"""Products that add adapters and residuals themselves give what the matrix library and two kernels give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.blocks import LEVELS, joining
from pronghorn.blocks.projection import adapted
from pronghorn.kernels import heads, products, tiles
from tests.blocks.inside import EXACT, outcomes
from tests.families.parity import (
    add_adapter,
    add_second_adapter,
    assert_same,
)
from tests.tiny import tiny_model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The formulas in torch take the kernel's place; how often it was called, by kind."""
    found: dict[str, int] = {}

    def counted(product: products.Product, out: Any = None) -> Any:
        kind = "output" if product.turned else "input gradient"
        found[kind] = found.get(kind, 0) + 1
        return products.multiply(product, out, impl="torch")

    monkeypatch.setattr(adapted, "multiply", counted)
    monkeypatch.setattr(tiles, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(tiles, "fills", lambda *sizes: True)
    monkeypatch.setattr(products, "LEAST_FULL", 0.0)
    # Only these products: gated units stay apart.
    monkeypatch.setattr(joining, "GATED_IN_PRODUCTS", False)
    return found


@pytest.mark.parametrize("tile_rows", [None, 128])
@pytest.mark.parametrize("level", LEVELS)
def test_every_level(
    level: str, tile_rows: int | None, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_adapter(tiny_model("qwen3", dtype=torch.float64), r=8, lora_alpha=12)
    inside, apart = outcomes("ADAPTERS_IN_PRODUCTS", model, level, monkeypatch, tile_rows)
    assert_same(inside, apart, EXACT)
    assert calls["output"] and calls["input gradient"]


@pytest.mark.parametrize(
    ("family", "options", "outputs", "gradients"),
    [
        ("llama", {"r": 8, "target_modules": ["q_proj", "o_proj"]}, True, True),
        ("llama", {"r": 8, "target_modules": ["gate_proj"]}, True, False),
        ("llama", {"r": 1}, False, False),
        ("llama", {"r": 128}, False, False),
        ("llama", {"r": 8, "rank_pattern": {"o_proj": 16, "down_proj": 128}}, True, True),
        ("llama", {"r": 8, "lora_dropout": 0.1}, True, False),
        ("llama", {"r": 8, "use_rslora": True}, True, True),
        ("phi3", {"r": 8}, True, True),
        ("qwen2", {"r": 16}, True, True),
        ("gemma2", {"r": 8}, True, True),
    ],
)
def test_other_adapters_and_families(
    family: str,
    options: dict[str, Any],
    outputs: bool,
    gradients: bool,
    calls: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of weights without an adapter the residual is added there, too."""
    model = add_adapter(tiny_model(family, dtype=torch.float64), lora_alpha=8, **options)
    inside, apart = outcomes("ADAPTERS_IN_PRODUCTS", model, "attention", monkeypatch)
    if "lora_dropout" not in options:
        assert_same(inside, apart, EXACT)
    assert ("output" in calls, "input gradient" in calls) == (outputs, gradients)


def test_two_adapters_and_all_weights_trained(calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    two = add_adapter(tiny_model("llama", dtype=torch.float64), r=8)
    add_second_adapter(two)
    inside, apart = outcomes("ADAPTERS_IN_PRODUCTS", two, "none", monkeypatch, step=False)
    assert_same(inside, apart, EXACT)
    inside, apart = outcomes(
        "ADAPTERS_IN_PRODUCTS", tiny_model("llama", dtype=torch.float64), "attention", monkeypatch, step=False
    )
    assert_same(inside, apart, EXACT)


#: two heads of q a tile, and one of k and v twice
WIDE = {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("options", "config", "made"),
    [
        ({"r": 8}, WIDE, True),
        ({"r": 8, "lora_alpha": 12}, WIDE, True),
        ({"r": 8, "rank_pattern": {"k_proj": 16}}, WIDE, False),
        ({"r": 8, "alpha_pattern": {"k_proj": 5}}, WIDE, False),
        ({"r": 8, "target_modules": ["q_proj", "v_proj"]}, WIDE, False),
        ({"r": 8, "lora_dropout": 0.1}, WIDE, True),
        ({"r": 8}, WIDE | {"attention_bias": True}, False),
        ({"r": 8}, {}, False),
    ],
)
@pytest.mark.parametrize("level", ["none", "all"])
def test_heads_by_one_product(
    level: str,
    options: dict[str, Any],
    config: dict[str, Any],
    made: bool,
    calls: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """q, k and v with their adapters and rotation, where all have one of the same rank and scaling."""
    found: list[heads.Heads] = []
    right = heads.rotated_heads

    def counted(call: heads.Heads) -> Any:
        found.append(call)
        return right(call)

    monkeypatch.setattr(adapted, "rotated_heads", counted)
    monkeypatch.setattr("pronghorn.engine.joined.joins", lambda device: True)
    model = add_adapter(tiny_model("llama", dtype=torch.float64, **config), **options)
    inside, apart = outcomes("ADAPTERS_IN_PRODUCTS", model, level, monkeypatch)
    if "lora_dropout" not in options:  # each draws masks of its own
        assert_same(inside, apart, EXACT)
    assert bool(found) == made
