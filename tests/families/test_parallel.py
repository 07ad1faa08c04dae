"""Layers whose attention and MLP stand side by side, where other tests of families do not look."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.blocks.layer import ParallelLayer
from pronghorn.engine import TrainingStep, binding_of
from pronghorn.engine.forward import build_layer
from pronghorn.engine.layer_call import LayerCall
from pronghorn.engine.stream import flatten_rows
from tests.families.parity import (
    FAMILIES,
    LENGTHS,
    add_adapter,
    assert_same,
    bound_copy,
    rows_batch,
    run,
    run_step,
)
from tests.tiny import tiny_model

#: as in tests.families.test_parity
EXACT = 5e-6


def stock(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return add_adapter(tiny_model(family, **{**FAMILIES[family], **options}).to(dtype))


@pytest.mark.parametrize("level", ["none", "attention"])
def test_tiles_of_rows(level: str) -> None:
    model = stock("cohere2")
    rows = rows_batch(model.config.vocab_size, (150, 120))
    fast = bound_copy(model, level)
    binding_of(fast).tile_rows = 128  # type: ignore[union-attr]
    assert_same(run(fast, rows, logits=False), run(model, rows, logits=False), EXACT)


def test_a_step_of_static_shape_gives_autograds_gradients() -> None:
    model = stock("cohere")
    rows = rows_batch(model.config.vocab_size, LENGTHS)
    fast = bound_copy(model, "attention").train()
    assert_same(run_step(TrainingStep(fast), fast, rows), run(model, rows, logits=False), EXACT)


@pytest.mark.parametrize("family", ["cohere", "cohere2"])
def test_the_triton_kernels_together(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and rotations through their Triton kernels, against Transformers in fp32."""
    from pronghorn.kernels import layer_norm, rope

    model = stock(family, torch.float32)
    batch = rows_batch(model.config.vocab_size, (5, 3))
    expected = run(model, batch, logits=False)
    for module in (layer_norm, rope):
        monkeypatch.setattr(module, "use_triton", lambda tensor, impl: True)
    # fp32: 2⁻²⁴ per operation over sums of some hundred terms.
    assert_same(run(bound_copy(model, "attention"), batch, logits=False), expected, 2e-5)


@pytest.mark.parametrize("level", ["none", "all"])
def test_the_input_stays_as_it_is(level: str) -> None:
    """Other layers write their output over the residual sum, which here is the layer's input."""
    fast = bound_copy(stock("cohere2"), level)
    embedded = fast.get_input_embeddings()(torch.arange(12)[None]).detach()
    hidden, stream = flatten_rows(embedded, None, None, {})
    call = LayerCall.of(binding_of(fast), hidden, stream, 0)  # type: ignore[arg-type]
    layer = build_layer(binding_of(fast).layers[0], call)  # type: ignore[union-attr]
    assert isinstance(layer, ParallelLayer)
    before = hidden.clone()
    layer.forward(hidden, level)  # type: ignore[arg-type]
    assert torch.equal(hidden, before)
