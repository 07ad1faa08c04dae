"""A value that is no number, put somewhere, is found there: tensor, layer, row and token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.data.collator import BOOKKEEPING, Collator
from pronghorn.engine import TrainingStep, bind
from pronghorn.engine.nonfinite import Finding, find_nonfinite
from tests.families.parity import add_adapter, quantise_4bit, rows_batch
from tests.tiny import tiny_model

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NAN, INF = float("nan"), float("inf")
INNER = "base_model.model."


def adapted(family: str = "llama", bound: bool = True, **options: Any) -> Any:
    model = add_adapter(tiny_model(family, **options).to(DTYPE)).to(DEVICE)
    if bound:
        bind(model, strict=True)
    return model


def packed(lengths: tuple[int, ...] = (9, 12, 5)) -> dict[str, Any]:
    """Documents of tokens 3, 4, 5, …, all different."""
    start, rows = 3, []
    for length in lengths:
        ids = list(range(start, start + length))
        rows.append({"input_ids": ids, "labels": ids})
        start += length
    batch = Collator(pad_token_id=0)(rows)
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return {k: v for k, v in moved.items() if k not in BOOKKEEPING}


def plant(model: Any, name: str, index: tuple[int, ...], value: float = NAN) -> None:
    with torch.no_grad():
        dict(model.named_parameters())[name][index] = value


def test_nothing_is_found_where_all_is_well():
    model = adapted()
    before = {name: p.grad for name, p in model.named_parameters()}
    model.eval()
    assert find_nonfinite(model, packed()) is None
    assert not model.training
    assert {name: p.grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "place,index",
    [
        ("input_layernorm.weight", (3,)),
        ("self_attn.k_proj.base_layer.weight", (2, 5)),
        ("self_attn.v_proj.lora_A.default.weight", (1, 7)),
        ("self_attn.o_proj.lora_B.default.weight", (4, 2)),
        ("post_attention_layernorm.weight", (0,)),
        ("mlp.gate_proj.lora_B.default.weight", (9, 1)),
        ("mlp.up_proj.base_layer.weight", (100, 60)),
        ("mlp.down_proj.base_layer.weight", (63, 127)),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_weight_of_a_layer(family, place, index, layer):
    model = adapted(family)
    name = f"{INNER}model.layers.{layer}.{place}"
    plant(model, name, index)
    found = find_nonfinite(model, packed())
    assert found is not None
    assert (found.tensor, found.kind, found.layer, found.value) == (name, "weight", layer, "nan")
    assert found.index == index and found.count == 1
    assert (found.row, found.position, found.token) == (0, 0, 3)
    assert "has a value that is nan (first at" in str(found)


@pytest.mark.parametrize(
    "place,index",
    [
        ("in_proj_qkv.base_layer.weight", (2, 5)),
        ("in_proj_z.lora_A.default.weight", (1, 7)),
        ("in_proj_a.base_layer.weight", (1, 3)),
        ("conv1d.weight", (3, 0, 1)),
        ("A_log", (2,)),
        ("norm.weight", (5,)),
        ("out_proj.lora_B.default.weight", (4, 2)),
    ],
)
def test_a_weight_of_linear_attention(place, index):
    model = adapted("qwen3_5_text")
    name = f"{INNER}model.layers.0.linear_attn.{place}"
    plant(model, name, index)
    found = find_nonfinite(model, packed())
    assert found is not None
    assert (found.tensor, found.kind, found.layer, found.index) == (name, "weight", 0, index)


@pytest.mark.parametrize(
    "family,place,index",
    [
        ("gemma3_text", "post_attention_layernorm.weight", (5,)),
        ("gemma3_text", "pre_feedforward_layernorm.weight", (0,)),
        ("gemma3_text", "post_feedforward_layernorm.weight", (63,)),
        ("gemma3_text", "self_attn.o_proj.base_layer.weight", (4, 2)),
        ("phi3", "self_attn.qkv_proj.base_layer.weight", (2, 5)),
        ("youtu", "self_attn.q_a_proj.base_layer.weight", (2, 5)),
        ("youtu", "self_attn.q_a_layernorm.weight", (5,)),
        ("youtu", "self_attn.kv_a_proj_with_mqa.lora_A.default.weight", (1, 7)),
        ("youtu", "self_attn.kv_a_layernorm.weight", (0,)),
        ("youtu", "self_attn.kv_b_proj.base_layer.weight", (3, 3)),
        ("phi3", "mlp.gate_up_proj.lora_B.default.weight", (200, 1)),
    ],
)
def test_a_weight_of_another_kind_of_layer(family, place, index):
    model = adapted(family)
    name = f"{INNER}model.layers.1.{place}"
    plant(model, name, index)
    found = find_nonfinite(model, packed())
    assert (found.tensor, found.layer, found.index) == (name, 1, index)


def test_the_first_of_two_layers_is_named():
    model = adapted()
    for layer in (0, 1):
        plant(model, f"{INNER}model.layers.{layer}.mlp.up_proj.base_layer.weight", (1, 1), INF)
    found = find_nonfinite(model, packed())
    assert found is not None and found.layer == 0 and found.value == "inf"


@pytest.mark.parametrize("row,position", [(0, 4), (1, 0), (1, 11), (2, 4)])
def test_an_embedding_row_names_the_token(row, position):
    model = adapted()
    token = 3 + sum((9, 12, 5)[:row]) + position
    plant(model, f"{INNER}model.embed_tokens.weight", (token, 6))
    found = find_nonfinite(model, packed())
    assert found is not None
    assert found.tensor == f"{INNER}model.embed_tokens.weight" and found.index == (token, 6)
    assert (found.row, found.position, found.token) == (row, position, token)


def test_rows_with_padding():
    model = adapted()
    batch = {k: v.to(DEVICE) for k, v in rows_batch(320, (9, 12, 5)).items()}
    token = int(batch["input_ids"][1, 7])
    first = (batch["input_ids"] == token) & batch["attention_mask"].bool()
    row, position = first.nonzero()[0].tolist()
    plant(model, f"{INNER}model.embed_tokens.weight", (token, 0))
    found = find_nonfinite(model, batch)
    assert found is not None and (found.row, found.position, found.token) == (row, position, token)


def test_a_token_that_overflows_in_one_layer():
    """float16: normalised, a token of one large element is √64 there and others about 1; (50 · 8)² is beyond 65,504."""
    if ON_GPU:
        pytest.skip("shown on the CPU")
    model = add_adapter(tiny_model("llama").to(torch.float16))
    bind(model, strict=True)
    token = 3 + 9 + 2
    with torch.no_grad():
        for name in ("gate", "up"):
            weight = model.get_parameter(f"{INNER}model.layers.1.mlp.{name}_proj.base_layer.weight")
            weight[:, :] = 0
            weight[0, 5] = 50.0
        model.get_parameter(f"{INNER}model.layers.1.post_attention_layernorm.weight")[5] = 1.0
        model.get_parameter(f"{INNER}model.embed_tokens.weight")[token] *= 0.0
        model.get_parameter(f"{INNER}model.embed_tokens.weight")[token, 5] = 100.0
    found = find_nonfinite(model, packed())
    assert found is not None and found.kind == "activation" and found.layer == 1
    assert "model.layers.1.mlp.down_proj" in found.tensor
    assert (found.row, found.position, found.token) == (1, 2, token)


def test_the_final_norm_and_the_head():
    for name, index in (("model.norm.weight", (5,)), ("lm_head.weight", (7, 3))):
        model = adapted()
        plant(model, INNER + name, index)
        found = find_nonfinite(model, packed())
        assert found is not None and found.tensor == INNER + name and found.index == index


def test_a_quantised_weight():
    pytest.importorskip("bitsandbytes")
    model = tiny_model("llama").to(DTYPE).to(DEVICE)
    quantise_4bit(model, False)
    model = add_adapter(model.cpu()).to(DEVICE)
    bind(model, strict=True)
    assert find_nonfinite(model, packed()) is None
    weight = model.get_parameter(f"{INNER}model.layers.1.self_attn.q_proj.base_layer.weight")
    weight.quant_state.absmax[0] = NAN
    found = find_nonfinite(model, packed())
    assert found is not None and found.kind == "weight" and found.layer == 1
    assert "self_attn.q_proj" in found.tensor and found.count == 64


def test_a_gradient(monkeypatch):
    """The loss is finite; going back, the first layer that gives no number is named."""
    from pronghorn.blocks import DecoderLayer

    model = adapted()
    right, calls = DecoderLayer.backward, []

    def wrong(self, *args):
        dx = right(self, *args)
        calls.append(None)
        if len(calls) == 2:  # layer 1 comes first, then layer 0
            dx[11, 0] = NAN
        return dx

    monkeypatch.setattr(DecoderLayer, "backward", wrong)
    found = find_nonfinite(model, packed())
    assert found is not None and found.kind == "gradient" and found.layer == 0
    assert "layers.0" in found.tensor and found.value == "nan"
    assert (found.row, found.position, found.token) == (1, 2, 14)


@pytest.mark.parametrize(
    "name,index",
    [
        ("model.layers.1.self_attn.q_proj.lora_A.default.weight", (1, 2)),
        ("model.layers.0.mlp.up_proj.base_layer.weight", (4, 4)),
        ("model.embed_tokens.weight", (15, 0)),
    ],
)
def test_a_stock_model(name, index):
    model = adapted(bound=False)
    plant(model, INNER + name, index)
    batch = {k: v.to(DEVICE) for k, v in rows_batch(320, (9, 12, 5)).items()}
    batch["input_ids"][1, 3] = 15
    found = find_nonfinite(model, batch)
    assert found is not None and found.index == index
    assert found.tensor == INNER + name.replace("lora_A.default", "lora_A.default")
    if "embed" in name:
        assert found.token == 15 and int(batch["input_ids"][found.row, found.position]) == 15


def test_a_captured_steps_batch():
    """What a step ran on is looked at without its graph and its flat adapters; the step goes on as before."""
    model, batch = adapted(), packed()
    step = TrainingStep(model)
    plant(model, f"{INNER}model.layers.1.mlp.gate_proj.lora_A.default.weight", (0, 0))
    output = step.run(batch, 10)
    assert output is not None and not torch.isfinite(output.loss)
    found = find_nonfinite(model, batch, normalizer=10)
    assert found is not None and found.tensor.endswith("layers.1.mlp.gate_proj.lora_A.default.weight")
    plant(model, f"{INNER}model.layers.1.mlp.gate_proj.lora_A.default.weight", (0, 0), 0.1)
    model.zero_grad()
    again = step.run(batch, 10)
    assert again is not None and torch.isfinite(again.loss)


def test_overflow_is_told_apart():
    found = Finding("x", "activation", 1, "inf", 3, 60000.0, "float16")
    assert found.overflowed and str(found) == "x has 3 values that are inf"
    assert not Finding("x", "weight", 1, "inf", 3, 60000.0, "float16").overflowed
    assert not Finding("x", "activation", 1, "inf", 3, 1e30, "bfloat16").overflowed
