"""Mixtures of experts: loss, logits and every gradient against Transformers + PEFT; see `test_parity` for the bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.blocks.moe import block
from pronghorn.engine import TrainingStep, base_causal_lm, binding_of
from tests.families.mixtures import MIXTURES, STACKS, add_expert_adapter, tiny_mixture
from tests.families.parity import (
    LENGTHS,
    add_second_adapter,
    assert_bf16_not_worse,
    assert_same,
    assert_same_at_every_level,
    assert_stream_equals_rows,
    assert_switches_are_seen,
    bound_copy,
    packed_batch,
    relative_error,
    rows_batch,
    run,
    run_step,
)

EXACT = 5e-6


def stock(family: str, mode: str = "lora", **options: Any) -> Any:
    model = tiny_mixture(family, **options).double()
    return add_expert_adapter(model) if mode == "lora" else model


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_rows_match_transformers_at_every_level(family: str, mode: str) -> None:
    assert_same_at_every_level(stock(family, mode), EXACT)


@pytest.mark.parametrize("family", MIXTURES)
def test_packed_stream_equals_rows(family: str) -> None:
    assert_stream_equals_rows(stock(family), "none", EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["gate.weight", "experts.down_proj"]},
        {"modules_to_save": ["gate"]},
        {"use_rslora": True, "layers_to_transform": [0]},
    ],
    ids=lambda options: "-".join(options),
)
def test_adapter_options(options: dict[str, Any]) -> None:
    """The router is trained where it is asked for, by an adapter or whole."""
    model = add_expert_adapter(tiny_mixture("qwen2_moe").double(), **options)
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    expected = run(model, batch)
    trains_router = "layers_to_transform" not in options
    assert any(".gate." in name for name in expected.gradients) == trains_router
    assert_same(run(bound_copy(model, "attention"), batch), expected, EXACT)


def test_two_active_adapters() -> None:
    model = stock("qwen3_moe")
    add_second_adapter(model, target_modules=["q_proj"], target_parameters=STACKS)
    batch = rows_batch(model.config.vocab_size, (9, 9))
    assert_same(run(bound_copy(model, "none"), batch), run(model, batch), EXACT)


def test_switched_off_and_merged_adapters_are_seen() -> None:
    assert_switches_are_seen(stock("mixtral"), EXACT)


def test_tiles_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock("qwen3_moe")
    batch = packed_batch(rows_batch(model.config.vocab_size, (150, 140)))
    whole, tiled = bound_copy(model, "none"), bound_copy(model, "attention")
    expected = run(whole, batch)
    seen = []
    rows = block.MoeBlock._forward_rows
    monkeypatch.setattr(block.MoeBlock, "_forward_rows", lambda *args: (seen.append(1), rows(*args))[1])
    binding_of(tiled).tile_rows = 128  # type: ignore[union-attr]
    assert_same(run(tiled, batch), expected, EXACT)
    assert len(seen) > 2 * 2  # two mixtures, two calls


def test_bf16_is_not_worse_than_transformers() -> None:
    """All experts are taken, because a token that changes its experts is an error that has nothing to do with rounding.
    Over eight draws (0.5 to 1.9 each) the ratio was 0.86."""
    alike = {"num_experts_per_tok": 6, "num_hidden_layers": 2, "mlp_only_layers": []}
    assert_bf16_not_worse(
        lambda seed: add_expert_adapter(tiny_mixture("qwen3_moe", **alike), seed=seed), seeds=6
    )


@pytest.mark.parametrize("family,name", [("mixtral", "experts"), ("qwen2_moe", "shared_expert")])
def test_a_hook_on_the_experts_runs_the_stock_decoder(family: str, name: str) -> None:
    fast = bound_copy(stock(family))
    called = []
    module = base_causal_lm(fast).model.layers[0].mlp.get_submodule(name)
    module.register_forward_hook(lambda *args: called.append(1))
    fast(input_ids=torch.arange(6)[None], use_cache=False)
    assert called
    assert f"{name} has hooks" in binding_of(fast).describe()  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_auxiliary_loss_and_its_gradients(family: str, mode: str) -> None:
    """By argument and by config; weighed so that its gradients count."""
    model = stock(family, mode, router_aux_loss_coef=0.7)
    batch = {**rows_batch(model.config.vocab_size, LENGTHS), "output_router_logits": True}
    fast = bound_copy(model, ["none", "all"])
    expected = run(model, batch, logits=False)
    assert_same(run(fast, batch, logits=False), expected, EXACT)
    aux_loss = model(**batch).aux_loss
    assert relative_error(fast(**batch).aux_loss, aux_loss) < EXACT
    assert (
        relative_error(run(fast, {**batch, "output_router_logits": False}, logits=False).loss, expected.loss)
        > 0.01
    )
    fast.config.output_router_logits = model.config.output_router_logits = True
    del batch["output_router_logits"]
    assert_same(run(fast, batch, logits=False), run(model, batch, logits=False), EXACT)
    handle = base_causal_lm(fast).model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert_same(run(fast, batch, logits=False), expected, EXACT)  # through the stock decoder
    handle.remove()
    with torch.no_grad():
        assert relative_error(fast.eval()(**batch).aux_loss, aux_loss) < EXACT


def test_the_auxiliary_loss_counts_tokens_that_somebody_learns_from() -> None:
    """Documents that fill a stream up count nothing, and the parts of a step weigh as their tokens do."""
    model = stock("qwen2_moe", router_aux_loss_coef=0.7)
    model.config.output_router_logits = True
    rows = rows_batch(model.config.vocab_size, (13, 7, 13))
    fast = bound_copy(model, "attention")
    expected = run(model, rows, logits=False)
    packed = packed_batch(rows)
    assert_same(run(fast, packed, logits=False), expected, EXACT)
    binding_of(fast).tile_rows = 128  # type: ignore[union-attr]
    filled = {name: torch.nn.functional.pad(packed[name], (0, 130)) for name in ("input_ids", "position_ids")}
    filled["labels"] = torch.nn.functional.pad(packed["labels"], (0, 130), value=-100)
    bounds = torch.cat([packed["cu_seq_lens_q"], packed["cu_seq_lens_q"][-1:] + 130])
    more = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 130, "max_length_k": 130}
    assert_same(run(fast, {**filled, **more}, logits=False), expected, EXACT)
    supervised = int((rows["labels"][:, 1:] != -100).sum())
    half = run(fast, {**packed, "num_items_in_batch": 2 * supervised}, logits=False)
    assert relative_error(half.loss, expected.loss / 2) < EXACT


def test_a_step_of_static_shape_gives_autograds_gradients() -> None:
    """With the adapters of attention in flat storage."""
    shared = [f"shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    model = add_expert_adapter(tiny_mixture("qwen2_moe").double(), target_modules=["q_proj", *shared])
    rows = rows_batch(model.config.vocab_size, LENGTHS)
    fast = bound_copy(model, "attention").train()
    assert_same(run_step(TrainingStep(fast), fast, rows), run(model, rows, logits=False), EXACT)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_triton_kernels_together(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole block through its Triton kernels, against Transformers in fp32."""
    from pronghorn.kernels import grouped_adapters, grouped_glu, grouped_matmul, grouped_rows, routing

    model = add_expert_adapter(tiny_mixture(family, num_hidden_layers=1, mlp_only_layers=[]))
    batch = rows_batch(model.config.vocab_size, (5, 3))
    expected = run(model, batch, logits=False)
    for module in (grouped_adapters, grouped_glu, grouped_matmul, grouped_rows, routing):
        monkeypatch.setattr(module, "use_triton", lambda tensor, impl: True)
    # fp32: 2⁻²⁴ per operation over sums of some hundred terms.
    assert_same(run(bound_copy(model, "attention"), batch, logits=False), expected, 2e-5)
