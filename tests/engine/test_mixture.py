"""Mixtures of experts as plans see them, and what a batch that is no number is blamed on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pronghorn.blocks import LEVELS, kept_bytes_per_token
from pronghorn.engine import bind, binding_of
from pronghorn.engine.forward import build_layer
from pronghorn.engine.layer_call import LayerCall
from pronghorn.engine.nonfinite import find_nonfinite
from pronghorn.engine.planning import levels_without_gpu, plan_with_expanded, shape_of, shape_of_config
from pronghorn.engine.stream import flatten_rows
from pronghorn.memory import Batch, estimate, rates_of
from tests.families.mixtures import add_expert_adapter, tiny_mixture
from tests.families.parity import packed_batch, rows_batch
from tests.tiny import tiny_config

FAMILIES = ["mixtral", "qwen2_moe"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_declared_bytes_are_kept_bytes(family: str, level: str) -> None:
    model = add_expert_adapter(tiny_mixture(family))
    bind(model, save_levels=level)
    binding, base = binding_of(model), model.get_base_model()
    embeddings = base.model.embed_tokens(torch.arange(12).view(2, 6))
    hidden_states, stream = flatten_rows(embeddings, None, None, {})
    layer = build_layer(base.model.layers[0], LayerCall.of(binding, hidden_states, stream, 0))
    _, saves = layer.forward(hidden_states, level)  # type: ignore[arg-type]
    alive = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saves.tensors()}
    measured = sum(alive.values()) + hidden_states.numel() * 4
    assert measured == 12 * kept_bytes_per_token(level, shape_of(binding).widths)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_adapters_are_counted_exactly(family: str) -> None:
    model = tiny_mixture(family)
    # What the shape does not count: the gate of a shared expert's output.
    plain = sum(p.numel() for name, p in model.named_parameters() if "shared_expert_gate" not in name)
    adapted = add_expert_adapter(model, r=8)
    bind(adapted)
    shape = shape_of(binding_of(adapted))  # type: ignore[arg-type]
    assert shape.parameters == plain
    assert shape.adapter_parameters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    same = shape_of_config(
        model.config, rank=8, storage="float32", dtype="float32", attention=shape.attention
    )
    assert (shape.mixture, shape.parameters) == (same.mixture, same.parameters)
    # Trained whole, every element has a gradient and two states.
    whole = replace(shape, trained="all")
    assert sum(whole.laid_out_tensors()) + sum(whole.optimizer_tensors()) == 3 * 4 * plain


def test_an_estimate_grows_with_what_is_kept_and_gives_all_back() -> None:
    model = add_expert_adapter(tiny_mixture("mixtral"))
    bind(model)
    shape = shape_of(binding_of(model))  # type: ignore[arg-type]
    batch = Batch(4096, 4000, 4)
    found = [estimate(shape, level, batch, tile_rows=1024) for level in LEVELS if "offload" not in level]
    assert [e.allocated for e in found] == sorted({e.allocated for e in found})
    assert levels_without_gpu(binding_of(model), batch, 1 << 40) == "all"  # type: ignore[arg-type]


def test_stacks_in_four_bits_are_not_planned_as_expanded() -> None:
    """What `keep_expanded_weights` holds are linear layers' weights."""
    for family, kept in (("mixtral", False), ("llama", True)):
        shape = shape_of_config(tiny_config(family), storage="nf4 double")
        found = plan_with_expanded(shape, 1 << 36, Batch(4096, 4000, 4), rates_of("H200"), 1 << 36)
        assert (found is not None) == kept


@pytest.mark.parametrize("name", ["mlp.gate.weight", "mlp.experts.gate_up_proj"])
def test_a_bad_weight_of_a_mixture_is_named(name: str) -> None:
    model = tiny_mixture("mixtral")
    bind(model)
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.{name}").view(-1)[3] = float("inf")
    found = find_nonfinite(model, packed_batch(rows_batch(320, (9, 5))))
    assert found is not None and found.tensor == f"model.layers.1.{name}"
