"""Answers of models with latent attention, whose cache holds codes: those of stock greedy generation, with adapters of
every projection, in any company and however scarce blocks are."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pronghorn import FastLanguageModel
from pronghorn.inference import engine as engine_module
from pronghorn.inference.captured import CapturedRunner
from pronghorn.inference.engine import Engine
from tests.families.mixtures import tiny_mixture
from tests.inference.test_engine import greedy, prompt, run, stock
from tests.tiny import draw_adapters_, tiny_model

PROMPTS = [prompt(seed, length) for seed, length in enumerate((5, 64, 65, 100))]
CODES = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
ADAPTERS = ["first", None, "second", "first"]


@pytest.fixture(params=[False, True], ids=["eager", "recorded"])
def recorded(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(engine_module, "_runner", CapturedRunner)


@pytest.fixture(scope="module")
def adapted():
    """A PEFT model with `first` on all of the attention and `second`, of another rank, on what makes k and v."""
    model = get_peft_model(tiny_model("youtu", seed=3), LoraConfig(r=4, target_modules=CODES), "first")
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules=["kv_b_proj"]))
    draw_adapters_(model, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def expected(adapted):
    base, found = adapted.get_base_model(), []
    for ids, adapter in zip(PROMPTS, ADAPTERS, strict=True):
        if adapter is None:
            with adapted.disable_adapter():
                found.append(stock(base, ids))
        else:
            adapted.set_adapter(adapter)
            found.append(stock(base, ids))
    return found


@pytest.mark.parametrize("blocks", [4, 32])
def test_adapters_in_any_company(adapted, expected, blocks, recorded, monkeypatch):
    """With few blocks contexts are computed again, and prompts come in parts."""
    engine = Engine(adapted, max_batch=3, max_context=192, cache_tokens=blocks * 64)
    if blocks == 4:
        monkeypatch.setattr(engine, "_prefill_tokens", 48)
    requests = [greedy(ids, adapter) for ids, adapter in zip(PROMPTS, ADAPTERS, strict=True)]
    assert len({tuple(answer) for answer in expected}) == len(expected)
    assert run(engine, requests, [0, 1, 2, 7]) == expected


def test_queries_without_a_code(recorded):
    model = tiny_mixture("deepseek_v2", q_lora_rank=None, topk_method="greedy", num_hidden_layers=2)
    found = run(Engine(model, max_batch=4, max_context=192), [greedy(ids) for ids in PROMPTS])
    assert found == [stock(model, ids) for ids in PROMPTS]


def test_the_cache_holds_codes():
    model = tiny_model("youtu")
    layers = Engine(model, max_context=64, cache_tokens=128)._runner.cache.layers
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    assert {tuple(layer.shape) for layer in layers} == {(3, 64, width)}


def test_an_adapter_with_a_bias_is_stocks(caplog):
    """A bias of keys and values has no place beside codes."""
    model = get_peft_model(
        tiny_model("youtu"), LoraConfig(r=4, target_modules=["kv_b_proj"], lora_bias=True, bias="lora_only")
    )
    FastLanguageModel.for_inference(model)
    given = {
        "input_ids": torch.tensor([PROMPTS[0]]),
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
    }
    assert torch.equal(
        model.generate(**given), type(model.get_base_model()).generate(model.get_base_model(), **given)
    )
    assert "has a bias on kv_b_proj" in caplog.text
