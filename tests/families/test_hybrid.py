"""Linear attention among full attention, in what `test_parity` leaves out.

Transformers computes the gated delta rule in fp32 whatever it is given: 2⁻²⁴ = 6e-8 a rounding, some tokens' worth of
which add up in a state and once more in its gradients. 3e-5 leaves room for that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn import FastLanguageModel
from pronghorn.blocks import LEVELS, Level, delta_net, head_groups, kept_bytes_per_token
from pronghorn.blocks.delta_net import DeltaHeads
from pronghorn.engine import TrainingStep, bind, binding_of
from pronghorn.engine.forward import build_layer
from pronghorn.engine.layer_call import LayerCall
from pronghorn.engine.planning import shape_of
from pronghorn.engine.stream import flatten_rows
from tests.families.parity import (
    FAMILIES,
    LENGTHS,
    TARGETS,
    add_adapter,
    assert_bf16_not_worse,
    assert_same,
    assert_stream_equals_rows,
    assert_switches_are_seen,
    bound_copy,
    rows_batch,
    run,
    run_step,
)
from tests.tiny import tiny_model
from tests.tiny_vision import tiny_vision_model, vision_batch

BOUND = 3e-5


def stock(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return tiny_model("qwen3_5_text", **{**FAMILIES["qwen3_5_text"], **options}).to(dtype)


def test_the_text_part_of_a_model_for_images() -> None:
    """Checkpoints are of this class. Positions of images have a time, a height and a width."""
    model = tiny_vision_model("qwen3_5", dtype=torch.float64)
    model = add_adapter(model, target_modules=rf".*language_model.*\.({'|'.join(TARGETS)})")
    rows = vision_batch("qwen3_5", [(3, (2, 2), 6), (2, (2, 3), 4, (2, 2), 5), (7,)], dtype=torch.float64)
    expected, fast = run(model, rows), bound_copy(model)
    for level in ("none", "all"):
        binding_of(fast).set_save_levels(level)  # type: ignore[union-attr]
        assert_same(run(fast, rows), expected, BOUND)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_documents_across_chunks(mode: str) -> None:
    """Several documents in a chunk of 64 tokens, and documents of several chunks."""
    model = stock(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"])
    model = add_adapter(model) if mode == "lora" else model
    rows = rows_batch(model.config.vocab_size, (70, 3, 40, 90))
    expected = run(model, rows)
    assert_same(run(bound_copy(model, "attention"), rows), expected, BOUND)
    assert_stream_equals_rows(model, "none", BOUND)


def test_groups_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a long stream."""
    monkeypatch.setattr(head_groups, "GROUP_TOKENS", 16)
    assert len(DeltaHeads(2, 16, 4, 32).groups(34)) == 2
    assert_stream_equals_rows(add_adapter(stock()), "none", BOUND)


def test_more_heads_of_values_or_as_many() -> None:
    for heads in (2, 6):
        model = add_adapter(stock(linear_num_value_heads=heads))
        rows = rows_batch(model.config.vocab_size, LENGTHS)
        assert_same(run(bound_copy(model, "matmuls"), rows), run(model, rows), BOUND)


def test_a_step_of_static_shape_gives_autograds_gradients() -> None:
    """With its filling documents, and the adapters of the four inputs in flat storage."""
    model = add_adapter(stock())
    rows = rows_batch(model.config.vocab_size, LENGTHS)
    step = TrainingStep(bound_copy(model, "attention").train())
    assert_same(run_step(step, step.model, rows), run(model, rows, logits=False), BOUND)
    (flat,) = step._flat
    assert flat is not None and len(flat.parameters) == 2 * (8 + 7)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["conv1d", "norm"]}], ids=list)
def test_adapter_options(options: dict[str, Any]) -> None:
    model = add_adapter(stock(), **options)
    rows = rows_batch(model.config.vocab_size, LENGTHS)
    assert_same(run(bound_copy(model, "attention"), rows), run(model, rows), BOUND)


def test_switched_off_and_merged_adapters_are_seen() -> None:
    assert_switches_are_seen(add_adapter(stock()), BOUND)


def test_bf16_is_not_worse_than_transformers() -> None:
    assert_bf16_not_worse(lambda seed: add_adapter(stock(torch.float32), seed=seed), seeds=6)


def test_usual_names_reach_both_kinds_of_layers() -> None:
    model = FastLanguageModel.get_peft_model(
        tiny_model("qwen3_5_text"), r=4, target_modules=["q_proj", "o_proj"]
    )
    adapted = {
        name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name
    }
    assert adapted == {"q_proj", "in_proj_qkv", "o_proj", "out_proj"}


def test_what_is_fast_and_what_is_not_is_said() -> None:
    model = tiny_model("qwen3_5_text")
    described = bind(model).describe()
    assert "the gated delta rule in 1 layers" in described
    model.model.layers[0].linear_attn.conv1d.register_forward_hook(lambda *args: None)
    assert "layers.0.linear_attn.conv1d has hooks" in binding_of(model).describe()  # type: ignore[union-attr]
    alone = tiny_model("qwen3_5_text", layer_types=["linear_attention"] * 2)
    assert "no layer of full attention" in bind(alone).describe()
    assert "hidden_act='gelu'" in bind(tiny_model("qwen3_5_text", hidden_act="gelu")).describe()


@pytest.mark.parametrize("level", LEVELS)
def test_both_kinds_of_layers_keep_no_more_than_is_declared(level: Level) -> None:
    model = add_adapter(stock(torch.float32))
    binding = bind(model, save_levels=level)
    declared, base = kept_bytes_per_token(level, shape_of(binding).widths), model.get_base_model()
    hidden, stream = flatten_rows(base.model.embed_tokens(torch.arange(40)[None]), None, None, {})
    call, kept = LayerCall.of(binding, hidden, stream, 0), []
    for layer in base.model.layers:
        _, saves = build_layer(layer, call).forward(hidden, level)
        kept.append(sum(t.nbytes for t in (hidden, *saves.tensors())) / 40)
    assert max(kept) <= declared <= max(kept) * 1.1


def test_a_mutated_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = delta_net.delta_rule_backward

    def mutated(*args: Any, **kwargs: Any) -> Any:
        dq, *others = correct(*args, **kwargs)
        return dq * 1.001, *others

    model = add_adapter(stock())
    rows = rows_batch(model.config.vocab_size, LENGTHS)
    expected = run(model, rows)
    monkeypatch.setattr(delta_net, "delta_rule_backward", mutated)
    with pytest.raises(AssertionError, match="in_proj_qkv"):
        assert_same(run(bound_copy(model), rows), expected, BOUND)


def test_heads_by_keys_are_taken_apart_and_put_together() -> None:
    """Qwen3-Next's order of columns."""
    heads, tokens = DeltaHeads(2, 3, 4, 5, by_keys=True), 7
    outputs = [torch.randn(tokens, 2 * (3 + 3 + 2 * 5 * 2)), torch.randn(tokens, 2 * 4)]
    qkv, z, b, a = heads.apart(outputs)
    second = outputs[0].view(tokens, 2, -1)[:, 1]
    assert torch.equal(qkv[:, 3:6], second[:, :3]) and torch.equal(z[:, 10:], second[:, 16:])
    assert torch.equal(heads.split(qkv)[2][:, 2:].flatten(1), second[:, 6:16])
    assert torch.equal(a[:, 2:], outputs[1][:, 6:])
    assert all(torch.equal(x, y) for x, y in zip(heads.together(qkv, z, b, a), outputs, strict=True))
