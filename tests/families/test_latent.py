"""Latent attention in the forms that `test_mixtures` and `test_parity` leave out; see `test_parity` for the bound."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pronghorn import FastLanguageModel
from pronghorn.blocks import head_groups, latent_attention
from pronghorn.engine import TrainingStep, bind, binding_of
from tests.families.mixtures import add_expert_adapter, tiny_mixture
from tests.families.parity import (
    LENGTHS,
    add_adapter,
    assert_bf16_not_worse,
    assert_generates_as_stock,
    assert_same,
    assert_same_at_every_level,
    assert_stream_equals_rows,
    bound_copy,
    packed_batch,
    quantise_4bit,
    relative_error,
    rows_batch,
    run,
    run_step,
)
from tests.tiny import tiny_model

EXACT = 5e-6
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

#: what is changed in the families' configurations
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # as V2-Lite: no code for q, no groups
    "v2 lite": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "num_hidden_layers": 2}),
    "v2 with biases": ("deepseek_v2", {"attention_bias": True, "rope_parameters": None}),
    "v3 without a code for q": ("deepseek_v3", {"q_lora_rank": None, "norm_topk_prob": False}),
    "v3 turning halves": ("deepseek_v3", {"rope_interleave": False, "attention_bias": True}),
    "v3 without groups": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    "v3 with values as wide as keys": ("deepseek_v3", {"v_head_dim": 40}),
    "youtu without a code for q": ("youtu", {"q_lora_rank": None}),
}


def stock(case: str, mode: str = "lora", dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    family, options = CASES.get(case, (case, {}))
    if family == "youtu":
        model = tiny_model(family, **options, **more).to(dtype)
        return add_adapter(model) if mode == "lora" else model
    model = tiny_mixture(family, **options, **more).to(dtype)
    return add_expert_adapter(model) if mode == "lora" else model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_rows_match_transformers_at_every_level(case: str, mode: str) -> None:
    assert_same_at_every_level(stock(case, mode), EXACT)


@pytest.mark.parametrize("case", CASES)
def test_packed_stream_equals_rows(case: str) -> None:
    assert_stream_equals_rows(stock(case), "attention", EXACT)


def test_adapters_on_every_module() -> None:
    """By the usual names: also on shared experts, and on the layers before the mixtures."""
    model = FastLanguageModel.get_peft_model(tiny_mixture("deepseek_v3").double(), r=4, target_modules=SEVEN)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)
    names = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "experts"]
    names += [f"{of}.{name}" for of in ("0.mlp", "shared_experts") for name in SEVEN[4:]]
    stock_model = copy.deepcopy(model)
    binding_of(stock_model).undo()  # type: ignore[union-attr]
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    expected = run(stock_model, batch)
    assert all(any(f".{name}." in found for found in expected.gradients) for name in names)
    binding_of(model).set_save_levels(["none", "attention", "matmuls"])  # type: ignore[union-attr]
    assert_same(run(model, batch), expected, EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "target_parameters": None},
        {"modules_to_save": ["gate", "kv_a_layernorm"]},
        {"bias": "all", "layers_to_transform": [1]},
    ],
    ids=lambda options: "-".join(options),
)
def test_adapter_options(options: dict[str, Any]) -> None:
    model = add_expert_adapter(tiny_mixture("deepseek_v3", attention_bias=True).double(), **options)
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    assert_same(run(bound_copy(model, "attention"), batch), run(model, batch), EXACT)


@pytest.mark.parametrize("case", ["v2 lite", "deepseek_v3", "youtu"])
def test_four_bit(case: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = stock(case, "full", torch.float32)
    model = quantise_4bit(model, True)
    model = add_adapter(model) if case == "youtu" else add_expert_adapter(model)
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    fast = bound_copy(model, "none")
    assert "nf4" in binding_of(fast).describe()  # type: ignore[union-attr]
    assert_same(run(fast, batch, logits=False), run(model, batch, logits=False), 2e-5)


def test_bf16_is_not_worse_than_transformers() -> None:
    """The dense one, in which no token can change its experts. Over thirty models (0.4 to 1.9 each) it was 0.86."""
    assert_bf16_not_worse(lambda seed: add_adapter(tiny_model("youtu", seed=seed), seed=seed), seeds=16)


def test_the_router_keeps_fp32_in_a_bf16_model() -> None:
    """The same experts as Transformers takes, whose logits are fp32 there too."""
    model = tiny_mixture("deepseek_v3", first_k_dense_replace=0, num_hidden_layers=1).bfloat16()
    fast = bound_copy(model)
    seen: dict[str, list[torch.Tensor]] = {"stock": [], "fast": []}
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *args: seen["stock"].append(args[2][0]))
    from pronghorn.kernels.routing import Scoring

    route = Scoring.route

    def watched(self: Scoring, logits: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen["fast"].append(logits)
        return route(self, logits, *args, **options)

    ids = torch.arange(40)[None]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Scoring, "route", watched)
        model(ids, use_cache=False)
        fast(ids, use_cache=False)
    assert seen["fast"][0].dtype == torch.float32
    # The inputs are bf16 on both sides and differ by their roundings.
    assert relative_error(seen["fast"][0], seen["stock"][0]) < 2**-7


def test_a_mutated_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = latent_attention.latent_heads_backward

    def mutated(*args: Any, **kwargs: Any) -> Any:
        dpair, dshared = correct(*args, **kwargs)
        return dpair, dshared * 1.001

    model = stock("deepseek_v3")
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    expected = run(model, batch)
    monkeypatch.setattr(latent_attention, "latent_heads_backward", mutated)
    with pytest.raises(AssertionError, match="kv_a_proj_with_mqa"):
        assert_same(run(bound_copy(model), batch), expected, EXACT)


@pytest.mark.parametrize("case", ["v2 lite", "deepseek_v3", "glm4_moe_lite"])
def test_the_triton_kernels_together(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole layer through its Triton kernels, against Transformers in fp32."""
    pytest.importorskip("triton")
    from pronghorn.kernels import (
        grouped_adapters,
        grouped_glu,
        grouped_matmul,
        grouped_rows,
        latent_heads,
        rms_norm,
        routing,
    )

    family, options = CASES.get(case, (case, {}))
    mixed = {"mlp_layer_types": ["sparse"]} if family == "glm4_moe_lite" else {"first_k_dense_replace": 0}
    model = add_expert_adapter(tiny_mixture(family, **{**options, **mixed, "num_hidden_layers": 1}))
    batch = rows_batch(model.config.vocab_size, (5, 3))
    expected = run(model, batch, logits=False)
    kernels = (grouped_adapters, grouped_glu, grouped_matmul, grouped_rows, latent_heads, rms_norm, routing)
    for module in kernels:
        monkeypatch.setattr(module, "use_triton", lambda tensor, impl: True)
    # fp32: 2⁻²⁴ per operation over sums of some hundred terms.
    assert_same(run(bound_copy(model, "attention"), batch, logits=False), expected, 2e-5)


@pytest.mark.parametrize("case", ["v2 lite", "deepseek_v3", "glm4_moe_lite"])
def test_generation_is_stock(case: str) -> None:
    assert_generates_as_stock(stock(case, "full", torch.float32))


def test_what_is_not_covered_is_named() -> None:
    wide = tiny_mixture("deepseek_v3", v_head_dim=48)
    assert "values wider than keys" in bind(wide).describe()
    hooked = bound_copy(tiny_mixture("deepseek_v3"))
    hooked.model.layers[1].self_attn.kv_a_layernorm.register_forward_hook(lambda *args: None)
    assert "layers.1.self_attn.kv_a_layernorm has hooks" in binding_of(hooked).describe()  # type: ignore[union-attr]


def test_the_balance_of_experts_is_the_stock_models() -> None:
    """Transformers adds none to the loss of these families; asking for routers' logits runs its decoder."""
    model = stock("deepseek_v3")
    fast = bound_copy(model)
    batch = {**rows_batch(model.config.vocab_size, LENGTHS), "output_router_logits": True}
    assert_same(run(fast, batch, logits=False), run(model, batch, logits=False), EXACT)


def test_values_that_are_padded_are_named() -> None:
    described = bind(tiny_mixture("deepseek_v3")).describe()
    assert "values of 32 columns are padded to the keys' 40" in described
    assert "padded" not in bind(tiny_mixture("deepseek_v3", v_head_dim=40)).describe()


def test_a_step_of_static_shape_gives_autograds_gradients() -> None:
    """With the adapters of the codes in flat storage."""
    rows, model = rows_batch(320, LENGTHS), stock("deepseek_v3")
    fast = bound_copy(model, "attention").train()
    step = TrainingStep(fast)
    assert_same(run_step(step, fast, rows), run(model, rows, logits=False), EXACT)
    (flat,) = step._flat
    assert flat is not None and len(flat.parameters) == 3 * 5 * 2


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_other_attentions_and_groups_of_heads(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are padded for each group of heads on its own."""
    monkeypatch.setattr(head_groups, "GROUP_TOKENS", 16)
    model = stock("deepseek_v3")
    rows = rows_batch(model.config.vocab_size, LENGTHS)
    fast = bound_copy(model, "attention")
    binding_of(fast).choose_attention(backend)  # type: ignore[union-attr]
    actual = run(fast, packed_batch(rows))
    actual.logits = actual.logits[0]  # type: ignore[index]
    assert_same(actual, run(model, rows), EXACT)
    assert head_groups.head_groups(34, 4, "eager") == 2
