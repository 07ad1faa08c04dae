"""Sizes read from a bound model and from its config; a plan set on it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from pronghorn.engine import bind, binding_of, planning
from pronghorn.engine.planning import (
    apply,
    host_bytes,
    keep_expanded_weights,
    plan_levels,
    plan_with_expanded,
    shape_of,
    shape_of_config,
)
from pronghorn.engine.tower_memory import vision_bytes
from pronghorn.errors import BudgetInvalid, BudgetTooSmall, UnsupportedCheckpoint
from pronghorn.memory import Batch, estimate, rates_of, with_margin
from pronghorn.memory.storages import stored_tensors
from tests.families.mixtures import add_expert_adapter, tiny_mixture
from tests.families.parity import (
    FAMILIES,
    add_adapter,
    assert_same,
    bound_copy,
    quantise_4bit,
    rows_batch,
    run,
)
from tests.tiny import tiny_config, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_exactly(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=family == "qwen2")
    plain = sum(p.numel() for p in model.parameters())
    adapted = add_adapter(model, r=8)
    bind(adapted)
    shape = shape_of(binding_of(adapted))
    assert shape.parameters == plain
    assert sum(shape.weight_tensors()) == 4 * plain
    assert shape.adapter_parameters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "family",
    ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"],
)
def test_weights_of_mixtures_are_counted_exactly(family: str) -> None:
    """Layers without a mixture, shared experts and routers among them."""
    mostly = {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}
    model = tiny_mixture(family, **(mostly if family == "glm4_moe_lite" else {}))
    plain = sum(p.numel() for p in model.parameters())
    adapted = add_expert_adapter(model, r=8)
    bind(adapted, strict=True)
    shape = shape_of(binding_of(adapted))
    assert shape.parameters == plain
    assert sum(shape.weight_tensors()) == 4 * plain


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_alone_gives_the_same_sizes(family: str) -> None:
    model = add_adapter(tiny_model(family), r=8)
    bind(model)
    read = shape_of(binding_of(model))
    assert read == shape_of_config(
        tiny_config(family), rank=8, storage="float32", dtype="float32", attention=read.attention
    )


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_weights_are_counted_by_their_tensors(double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    model = add_adapter(quantise_4bit(tiny_model("llama"), double))
    bind(model)
    shape = shape_of(binding_of(model))
    assert shape.storage == ("nf4 double" if double else "nf4")
    gate = model.get_base_model().model.layers[0].mlp.gate_proj.base_layer
    state = gate.weight.quant_state
    tensors = [gate.weight.data, state.absmax, state.code]
    if double:
        tensors += [state.state2.absmax, state.state2.code, state.offset.reshape(1)]
    from pronghorn.memory.storages import stored_tensors

    assert sorted(stored_tensors(*shape.linear("gate"), shape.storage)) == sorted(
        t.numel() * t.element_size() for t in tensors
    )


def test_full_fine_tuning_is_seen() -> None:
    model = tiny_model("llama")
    bind(model)
    assert shape_of(binding_of(model)).trained == "all"


def test_a_plan_is_set_and_changes_no_gradient() -> None:
    model = add_adapter(tiny_model("llama", num_hidden_layers=4))
    batch = rows_batch(model.config.vocab_size, (13, 7, 13))
    fast = bound_copy(model, "all")
    binding = binding_of(fast)
    sized = Batch(4096, 4096, 4)
    shape = shape_of(binding)
    least, most = (estimate(shape, level, sized).reserved for level in ("offload", "all"))
    found = plan_levels(binding, (least + most) // 2, sized)
    assert binding.save_levels == found.levels and found.estimate.reserved <= (least + most) // 2
    assert set(found.levels) not in ({"all"}, {"offload"}), "something in between"
    assert_same(run(fast, batch), run(bound_copy(model, "all"), batch), 1e-6)


def test_host_bytes_hold_every_tensor() -> None:
    model = add_adapter(tiny_model("llama"))
    binding = bind(model)
    binding.set_save_levels("offload-matmuls")
    assert host_bytes(binding, 1000) >= 2 * 1000 * 4 * (64 * 4 + 2 * 32 + 2 * 128)
    binding.set_save_levels("all")
    assert host_bytes(binding, 1000) == 2 * 16 * 512


def test_errors_name_numbers_and_a_way_out() -> None:
    model = add_adapter(tiny_model("llama"))
    binding = bind(model)
    with pytest.raises(BudgetTooSmall, match=r"does not fit into 0\.01 GiB.*raise the budget to"):
        plan_levels(binding, 2**20, Batch(4096, 4096, 4))
    with pytest.raises(BudgetInvalid, match="'17 parsecs' is no memory size"):
        plan_levels(binding, "17 parsecs", Batch(64, 64, 1))
    config = tiny_config("llama")
    config.model_type = "mamba"
    with pytest.raises(UnsupportedCheckpoint, match="mamba"):
        shape_of_config(config)


def test_what_the_allocator_holds_is_told_beside_what_sizes_say(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = add_adapter(tiny_model("llama"), r=8)
    bind(model)
    monkeypatch.setattr(planning, "placed_bytes", lambda binding: 2**29)
    with caplog.at_level("INFO", logger="pronghorn"):
        found = plan_levels(binding_of(model), 2**34, Batch(64, 64, 1))
    assert found.estimate.reserved >= 2**29
    assert "hold 0.500 GiB, 0.001 by their sizes" in caplog.text


def test_four_bit_weights_keep_their_margin_where_they_are_also_kept_expanded() -> None:
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=8192, tie_word_embeddings=True,
    )  # fmt: skip
    shape = shape_of_config(config, storage="nf4 double")
    found = [
        (budget, plan_with_expanded(shape, budget, Batch(1024, 1000, 4), rates_of("H200"), 2**40))
        for budget in range(2**28, 2**29, 2**24)
    ]
    fitting = [(budget, one.estimate.reserved) for budget, one in found if one is not None]
    assert len(fitting) > 4
    assert all(with_margin(reserved, shape) <= budget for budget, reserved in fitting)


def test_applying_twice_is_applying_once() -> None:
    model = add_adapter(tiny_model("llama"))
    binding = bind(model)
    found = plan_levels(binding, 2**34, Batch(64, 64, 1))
    apply(binding, found, shape_of(binding))
    assert set(binding.save_levels) == {"all"} and binding.tile_rows is None
    assert torch.is_tensor(next(model.parameters()))


def test_layers_may_differ_in_storage() -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", num_hidden_layers=3)
    last = copy.deepcopy(model.model.layers[2])
    quantise_4bit(model, double_quant=True)
    model.model.layers[2] = last
    bind(model)
    shape = shape_of(binding_of(model))
    assert shape.storage == "nf4 double"
    assert shape.layer_storages == ("nf4 double", "nf4 double", "float32") and not shape.linear_tensors


def test_modules_of_a_layer_may_differ_in_storage() -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", num_hidden_layers=3)
    gate = model.model.layers[2].mlp.gate_proj
    quantise_4bit(model, double_quant=True)
    model.model.layers[2].mlp.gate_proj = gate
    bind(model)
    shape = shape_of(binding_of(model))
    assert shape.storage == "nf4 double" and not shape.layer_storages
    whole = replace(shape, linear_tensors=())
    four_bit = sum(stored_tensors(*shape.linear("gate"), "nf4 double"))
    assert sum(shape.weight_tensors()) == sum(whole.weight_tensors()) - four_bit + gate.weight.nbytes


def test_four_bit_weights_are_kept_expanded_where_there_is_room() -> None:
    model = add_adapter(quantise_4bit(tiny_model("llama"), True))
    binding = bind(model, strict=True)
    batch = Batch(4096, 4096, 4)
    modules = [m for m in model.modules() if hasattr(m._parameters.get("weight"), "quant_state")]
    found = plan_levels(binding, 2**34, batch)
    assert all("pronghorn_expanded" in module._buffers for module in modules) and len(modules) == 14
    assert "kept as their products multiply them" in " ".join(found.reasons)
    without = estimate(shape_of(binding), found.levels, batch)
    more = found.estimate.weights - without.weights
    held = sum(module._buffers["pronghorn_expanded"].nbytes for module in modules)
    assert held == pytest.approx(more, rel=0.05) and not any(
        "pronghorn_expanded" in name for name in model.state_dict()
    )
    assert keep_expanded_weights(binding, False) == 0
    assert not any("pronghorn_expanded" in module._buffers for module in modules)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_the_language_model_of_one_that_reads_images(kind: str) -> None:
    """Its sizes are exact; the tower's weights and an upper bound of its tensors are set aside."""
    tiny_vision = pytest.importorskip("tests.tiny_vision")
    model = tiny_vision.tiny_vision_model(kind)
    plain = sum(p.numel() for part in (model.model.language_model, model.lm_head) for p in part.parameters())
    tower = sum(p.nbytes for p in model.parameters()) - 4 * plain
    adapted = add_adapter(model, r=8, target_modules=r".*language_model.*(proj)")
    bind(adapted, strict=True)
    binding = binding_of(adapted)
    shape = shape_of(binding)
    assert shape.parameters == plain and not shape.tied
    alone = shape_of_config(
        model.config, rank=8, dtype="float32", storage="float32", attention=shape.attention
    )
    assert (alone.parameters, alone.qkv_bias, alone.adapter_parameters) == (
        shape.parameters,
        shape.qkv_bias,
        shape.adapter_parameters,
    )
    batch = Batch(256, 256, 4)
    aside = vision_bytes(binding, 256)
    assert aside > tower == vision_bytes(binding, 0)
    least = estimate(shape, ["offload"] * shape.layers, batch).reserved
    found = plan_levels(binding, least + aside + 2**20, batch)
    assert found.budget == least + 2**20 and "set aside for the vision tower" in found.reasons[-1]
    # The bound may be more than there is room for; the weights lie there in any case.
    bare = plan_levels(binding, least + tower + 2**20, batch)
    assert bare.budget == least + 2**20
    with pytest.raises(BudgetTooSmall):
        plan_levels(binding, tower + 2**10, batch)
