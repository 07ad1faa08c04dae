"""The schedule of a step against the engine itself, at the sizes of Llama-3.1-8B with fewer layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import (
    CohereConfig,
    DeepseekV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    YoutuConfig,
)

from pronghorn.blocks import LEVELS, joining, long_rows
from pronghorn.engine import binding_of
from pronghorn.engine.binding import Binding
from pronghorn.engine.planning import shape_of
from pronghorn.memory import Batch, estimate
from pronghorn.memory.allocator import MIB, Allocator
from pronghorn.memory.estimate import with_model
from tests.memory.rehearsal import (
    in_four_bits,
    in_fp8,
    in_int8,
    joined,
    measure,
    meta_model,
    on_hopper,
    packed,
    prepare,
)

pytest.importorskip("triton")

SIZES: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


#: Experts' matrices as PEFT names them.
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def compare(model: Any, levels: str | list[str], tokens: int, tile_rows: int | None = None) -> None:
    binding = binding_of(model)
    assert binding is not None
    binding.set_save_levels(levels)
    binding.tile_rows = tile_rows
    shape, batch = shape_of(binding, packed=False, captured=False), Batch(tokens, tokens - 4, 4)
    memory, fixed, _ = with_model(shape, (9, 0))
    peak = measure(model, tokens, 4, memory)
    found = estimate(shape, levels, batch, tile_rows=tile_rows)
    # A layer's gradients are made apart from their buffers here, as adapters are not packed: they wait for its end.
    apart = shape.mixture is None and binding.packed is None
    gradients = shape.adapter_parameters * 4 // shape.layers if apart else 0
    # Beyond those, one per cent of what the step takes: casts of single adapters, statistics of a row.
    assert found.allocated - fixed == pytest.approx(peak - gradients / 2, abs=gradients / 2 + 0.013 * peak)
    assert found.reserved == pytest.approx(memory.peak_reserved, rel=0.03)


@pytest.mark.parametrize("tile_rows", [None, 2048])
@pytest.mark.parametrize("level", LEVELS)
def test_every_level(level: str, tile_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    compare(meta_model(LlamaConfig(**SIZES)), level, 8192, tile_rows)


@pytest.mark.parametrize("tile_rows", [None, 2048])
@pytest.mark.parametrize("level", LEVELS)
def test_weights_side_by_side(level: str, tile_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    compare(joined(meta_model(LlamaConfig(**SIZES))), level, 8192, tile_rows)


@pytest.mark.parametrize("tile_rows", [None, 2048])
@pytest.mark.parametrize("level", LEVELS)
def test_a_gated_unit_inside_its_products(
    level: str, tile_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(monkeypatch, parking=True)
    on_hopper(monkeypatch)
    model = packed(joined(meta_model(LlamaConfig(**SIZES))))
    assert shape_of(binding_of(model)).makes_unit  # type: ignore[arg-type]
    compare(model, level, 8192, tile_rows)


@pytest.mark.parametrize("inside", [False, True])
def test_the_order_of_adapted_products(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the o-projection adds the residual the allocator ends with other holes: by 50 MB of 17 GiB at 8B."""
    prepare(monkeypatch, parking=True)
    on_hopper(monkeypatch)
    monkeypatch.setattr(joining, "ADAPTERS_IN_PRODUCTS", inside)
    model = packed(joined(meta_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 8}))))
    levels = ["offload-attention"] * 3 + ["all"] * 5
    binding = binding_of(model)
    assert binding is not None
    binding.set_save_levels(levels)
    shape = shape_of(binding, packed=False, captured=False)
    assert shape.residual_in_o == inside and bool(shape.whole_input_grads) == inside
    memory, _, _ = with_model(shape, (9, 0))
    measure(model, 8192, 4, memory)
    found = estimate(shape, levels, Batch(8192, 8188, 4))
    assert found.reserved == pytest.approx(memory.peak_reserved, rel=1e-3)


@pytest.mark.parametrize("level", ["none", "attention", "matmuls", "all"])
def test_a_gated_unit_inside_its_products_with_norms_behind_it(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(monkeypatch, parking=False)
    on_hopper(monkeypatch)
    config = Gemma2Config(**{**SIZES, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096})
    model = packed(joined(meta_model(config)))
    assert shape_of(binding_of(model)).makes_unit  # type: ignore[arg-type]
    compare(model, level, 4096)


@pytest.mark.parametrize("level", ["offload", "none", "attention", "all"])
def test_four_bit_weights(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    compare(in_four_bits(meta_model(LlamaConfig(**SIZES))), level, 4096)


@pytest.mark.parametrize(
    "tokens, level, again",
    [
        (221_184, "offload", False),
        (262_144, "offload", True),
        (73_728, "offload-attention", False),
        (8_192, "all", False),
    ],
)
def test_a_recorded_step_stays_in_its_piece(
    tokens: int, level: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of these took 1.7 GiB more than planned on an H200: one tensor that found no hole."""
    prepare(monkeypatch, parking=True)
    monkeypatch.setattr(long_rows, "SCARCE_TILES", 2**20 if again else 0)
    monkeypatch.setattr(Binding, "attention_backend", lambda self, *args, **kwargs: "cudnn")
    model = in_four_bits(meta_model(LlamaConfig(**SIZES)))
    binding = binding_of(model)
    assert binding is not None
    binding.set_save_levels(level)
    shape, batch = shape_of(binding, packed=False, captured=True), Batch(tokens, tokens - 1, 1)
    rough, found = (estimate(shape, level, batch, settled_up_to=most) for most in (0.0, math.inf))

    def taken_within(piece: int) -> int:
        pool = Allocator()
        pool.free(pool.new(piece))
        measure(model, tokens, 1, pool, steps=1)
        return pool.peak_reserved

    taken, fixed = taken_within(found.piece), with_model(shape, (9, 0))[0].reserved
    assert found.reserved - fixed == pytest.approx(taken, abs=32 * MIB)
    assert taken - found.piece < 32 * MIB
    if tokens == 221_184:
        roughly = taken_within(rough.piece)
        assert roughly > rough.reserved - fixed + 1000 * MIB, "nothing was short: nothing is shown here"


@pytest.mark.parametrize("level", ["none", "attention", "all"])
def test_short_streams_join_queries_too(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    assert joining.joins_qkv_forward(1024, 1024)
    compare(joined(meta_model(LlamaConfig(**SIZES))), level, 1024)


@pytest.mark.parametrize("stacks", [False, True])
@pytest.mark.parametrize("level", ["offload", "none", "attention", "all"])
def test_fp8_weights(level: str, stacks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    compare(in_fp8(meta_model(LlamaConfig(**SIZES)), monkeypatch, stacks=stacks), level, 8192)


@pytest.mark.parametrize("copies", [0, 1, 2])
@pytest.mark.parametrize("level", ["offload", "none", "attention", "all"])
def test_int8_weights(level: str, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    compare(in_int8(meta_model(LlamaConfig(**SIZES)), monkeypatch, copies), level, 8192)


@pytest.mark.parametrize("level", ["none", "attention", "all"])
def test_normed_queries_and_keys(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    compare(meta_model(Qwen3Config(**SIZES)), level, 4096)


#: families whose layers hold more, or other things, than Llama's
OTHERS: dict[str, Any] = {
    "cohere": CohereConfig(**SIZES, use_qk_norm=True),
    "gemma2": Gemma2Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES),
    "glm": GlmConfig(**SIZES, pad_token_id=0),
    # Of OLMo 2 7B.
    "olmo2": Olmo2Config(
        vocab_size=100352,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=3,
        num_attention_heads=32,
    ),
    "granite": GraniteConfig(**SIZES, residual_multiplier=0.2),
    "phi3": Phi3Config(**SIZES, pad_token_id=0),
}


@pytest.mark.parametrize("level", ["none", "attention", "offload-matmuls", "all"])
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    compare(meta_model(OTHERS[family]), level, 4096, 1024 if level == "attention" else None)


#: DeepSeek's heads: values narrower than keys
LATENT: dict[str, Any] = {
    **{name: size for name, size in SIZES.items() if name != "head_dim"},
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("q_code", [1536, None])
def test_latent_attention(level: str, q_code: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    config = YoutuConfig(**LATENT, q_lora_rank=q_code)
    compare(meta_model(config), level, 4096, 1024 if level == "attention" else None)


@pytest.mark.parametrize("level", ["offload", "attention"])
def test_latent_attention_of_a_long_stream_in_four_bits(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of heads."""
    prepare(monkeypatch, parking=True)
    compare(in_four_bits(meta_model(YoutuConfig(**LATENT, q_lora_rank=1536))), level, 65536)


@pytest.mark.parametrize("tile_rows", [None, 2048])
@pytest.mark.parametrize("level", ["none", "attention", "offload-matmuls", "matmuls", "all"])
def test_latent_attention_before_a_mixture(
    level: str, tile_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek-V2-Lite's sizes."""
    prepare(monkeypatch, parking=True)
    sizes = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16}
    of_experts = {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408}
    config = DeepseekV2Config(**{**LATENT, **sizes}, **of_experts, q_lora_rank=None)
    model = meta_model(
        config,
        target_modules=["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        target_parameters=STACKS,
    )
    compare(model, level, 8192, tile_rows)


@pytest.mark.parametrize("tile_rows", [None, 2048])
@pytest.mark.parametrize("level", ["none", "offload-attention", "attention", "all"])
def test_a_mixture(level: str, tile_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-30B-A3B's sizes: gradients of a layer's experts wait for its end, those of later tiles are added."""
    prepare(monkeypatch, parking=True)
    sizes = {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_key_value_heads": 4,
        "vocab_size": 151936,
    }
    config = Qwen3MoeConfig(**{**SIZES, **sizes}, num_experts=128, num_experts_per_tok=8)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    compare(meta_model(config, target_modules=attention, target_parameters=STACKS), level, 8192, tile_rows)


@pytest.mark.parametrize("level", ["offload", "none", "attention", "matmuls", "all"])
def test_linear_attention_among_others(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    config = Qwen3_5TextConfig(**SIZES, layer_types=kinds)
    compare(meta_model(config), level, 4096, 1024 if level == "attention" else None)


@pytest.mark.parametrize("level", ["offload", "attention"])
def test_linear_attention_of_a_long_stream(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of heads."""
    prepare(monkeypatch, parking=True)
    config = Qwen3_5TextConfig(
        **SIZES, layer_types=["linear_attention", "linear_attention", "full_attention"]
    )
    compare(in_four_bits(meta_model(config)), level, 65536)


@pytest.mark.parametrize("level", ["none", "all"])
def test_linear_attention_before_a_mixture(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modules of the layer's input, taken apart by heads."""
    prepare(monkeypatch, parking=True)
    sizes = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256}
    of_experts = {"num_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 512}
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    config = Qwen3NextConfig(**{**SIZES, **sizes}, **of_experts, layer_types=kinds)
    model = meta_model(
        config,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"],
        target_parameters=STACKS,
    )
    compare(model, level, 4096)


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_other_families_in_four_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    compare(in_four_bits(meta_model(OTHERS[family])), "none", 4096)


@pytest.mark.parametrize("attention", ["flash", "cudnn"])
@pytest.mark.parametrize("level", ["offload", "none"])
def test_a_long_stream(level: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, groups of heads, chunks of the loss."""
    prepare(monkeypatch, parking=True)
    monkeypatch.setattr(Binding, "attention_backend", lambda self, *args, **kwargs: attention)
    compare(in_four_bits(meta_model(LlamaConfig(**SIZES))), level, 65536)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("attention", ["flash", "cudnn"])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_a_layer_of_a_long_row(
    family: str, attention: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tiles and groups of heads, with the gradient in one place; with q, k and v made again."""
    prepare(monkeypatch, parking=True)
    monkeypatch.setattr(long_rows, "SCARCE_TILES", 2**20 if again else 0)
    monkeypatch.setattr(Binding, "attention_backend", lambda self, *args, **kwargs: attention)
    config = {"llama": LlamaConfig(**SIZES), "qwen3": Qwen3Config(**SIZES), **OTHERS}[family]
    compare(in_four_bits(meta_model(config)), "offload", 140_000)


def test_mixed_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 6})
    levels = ["offload", "offload-attention", "offload", "offload-attention", "attention", "matmuls"]
    compare(meta_model(config), levels, 8192)


def test_an_allocator_is_handed_every_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, parking=True)
    model, memory = meta_model(LlamaConfig(**SIZES)), Allocator()
    peak = measure(model, 1024, 4, memory)
    assert memory.allocated == 0 and peak <= memory.peak_allocated < 1.01 * peak + 2**20
