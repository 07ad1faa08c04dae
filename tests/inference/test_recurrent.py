"""Answers of models with linear attention, whose layers keep a state: those of stock greedy generation, with adapters
of every projection, in any company, in parts, and however scarce blocks are."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pronghorn import FastLanguageModel
from pronghorn.inference import engine as engine_module
from pronghorn.inference.captured import CapturedRunner
from pronghorn.inference.engine import Engine
from pronghorn.inference.forward import cache_bytes_per_token, state_bytes_per_sequence
from tests.families.mixtures import ATTENTION, tiny_mixture
from tests.inference.test_engine import (
    assert_same,
    greedy,
    prompt,
    recorded_steps_ask_nothing,
    run,
    run_tokens,
    sampled,
    stock,
)
from tests.inference.test_engine_adapters import fp8, int8, nf4
from tests.inference.test_model_generate import through_engine
from tests.tiny import draw_adapters_, tiny_model
from tests.tiny_vision import tiny_vision_model

PROMPTS = [prompt(seed, length) for seed, length in enumerate((2, 64, 65, 100))]
ADAPTERS = ["first", None, "second", "first"]
NEW = 12


@pytest.fixture(params=[False, True], ids=["eager", "recorded"])
def recorded(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(engine_module, "_runner", CapturedRunner)


def adapted(model):
    """A PEFT model with `first` on all of both kinds of attention and `second`, of another rank, on a part."""
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION), "first")
    inner = ["in_proj_a", "in_proj_qkv", "in_proj_qkvz", "q_proj"]
    peft.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules=inner))
    draw_adapters_(peft, 0.2)
    return peft.eval()


def answers(model, adapters=ADAPTERS) -> list[list[int]]:
    base, found = model.get_base_model(), []
    for ids, adapter in zip(PROMPTS, adapters, strict=True):
        if adapter is None:
            with model.disable_adapter():
                found.append(stock(base, ids, NEW))
        else:
            model.set_adapter(adapter)
            found.append(stock(base, ids, NEW))
    return found


@pytest.fixture(scope="module")
def model():
    return adapted(tiny_model("qwen3_5_text", seed=3))


@pytest.fixture(scope="module")
def expected(model):
    return answers(model)


@pytest.mark.parametrize(("blocks", "part"), [(4, 50), (4, 2), (32, 2048)])
def test_adapters_in_any_company(model, expected, blocks, part, recorded, monkeypatch):
    """With few blocks contexts are computed again, and prompts come in parts: shorter than what the convolution
    reaches, and ones that do not fill a chunk."""
    engine = Engine(model, max_batch=3, max_context=192, cache_tokens=blocks * 64)
    monkeypatch.setattr(engine, "_prefill_tokens", part)
    requests = [greedy(ids, adapter, NEW) for ids, adapter in zip(PROMPTS, ADAPTERS, strict=True)]
    assert len({tuple(answer) for answer in expected}) == len(expected)
    assert run(engine, requests, [0, 1, 2, 7]) == expected
    assert sorted(engine._free_states) == [0, 1, 2]


def test_waiting_sequences_are_computed_again(recorded):
    """Two requests that grow into more blocks than there are."""
    model = tiny_model("qwen3_5_text", seed=2)
    ids = [prompt(seed, 60) for seed in (1, 2)]
    engine = Engine(model, max_batch=2, max_context=160, cache_tokens=4 * 64)
    for one in ids:
        engine.submit(greedy(one, count=80))
    preempted, found = 0, {0: [], 1: []}
    while engine.has_work:
        before = engine.running
        for event in engine.step():
            found[event.request_id] += [token.id for token in event.tokens]
        preempted += before == 2 and engine.waiting == 1
    assert preempted and list(found.values()) == [stock(model, one, 80) for one in ids]


def test_slots_that_others_left(model, recorded):
    """A cancelled request's state, and a step on its way, leave nothing behind."""
    engine = Engine(model, max_batch=2, max_context=192)
    requests = [sampled(ids, "first") for ids in PROMPTS[:3]]
    alone = [run_tokens(Engine(model, max_context=192), [one])[0] for one in requests]
    cancelled = engine.submit(requests[2])
    for _ in range(3):
        engine.step()
    engine.cancel(cancelled)
    found = {engine.submit(one): [] for one in requests}
    while engine.has_work:
        for event in engine.step():
            found.get(event.request_id, []).extend(event.tokens)
    assert_same(list(found.values()), alone)


def test_a_mixture_with_heads_by_keys(recorded):
    model = adapted(tiny_mixture("qwen3_next", seed=4))
    requests = [greedy(ids, adapter, NEW) for ids, adapter in zip(PROMPTS, ADAPTERS, strict=True)]
    assert run(Engine(model, max_batch=4, max_context=192), requests) == answers(model)


def test_a_merged_adapter_and_model_generate(caplog):
    model = adapted(tiny_model("qwen3_5_text", seed=3))
    model.set_adapter("first")
    ids = torch.tensor([PROMPTS[1]])
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids, **given)
    FastLanguageModel.for_inference(model)
    assert torch.equal(model.generate(ids, **given), wanted)
    model.merge_adapter(["first"])
    assert torch.equal(model.generate(ids, **given), wanted)
    assert through_engine(model.get_base_model()) and "own loop" not in caplog.text


@pytest.mark.parametrize("store", [nf4, fp8, int8])
def test_weights_in_codes(store, recorded):
    model = tiny_model("qwen3_5_text")
    requests = [sampled(ids) for ids in PROMPTS]
    dense = run_tokens(Engine(model, max_context=192), requests)
    stored = store(model)
    found = run_tokens(Engine(stored, max_batch=2, max_context=192), requests)
    assert found[3] != dense[3]
    # Against the bound forward without a cache, which multiplies the same codes: what prompts are computed with.
    stored.config.use_cache = False
    for request, answer in zip(requests, found, strict=True):
        with torch.no_grad():
            logits = stored(torch.tensor([request.prompt_ids])).logits
        assert abs(float(logits[0, -1].log_softmax(-1)[answer[0].id]) - answer[0].logprob) < 1e-5
    alone = [run_tokens(Engine(stored, max_context=192), [request])[0] for request in requests]
    assert_same(found, alone)


def test_parts_that_an_adapter_trains_whole(recorded):
    model = tiny_model("qwen3_5_text", seed=3)
    before = stock(model, PROMPTS[2], NEW)
    options = {"r": 4, "target_modules": ["in_proj_z"], "modules_to_save": ["conv1d", "linear_attn.norm"]}
    peft = get_peft_model(model, LoraConfig(**options), "only")
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(-1.5)
    expected = stock(peft.eval().get_base_model(), PROMPTS[2], NEW)
    found = run(Engine(peft, max_context=192), [greedy(PROMPTS[2], "only", NEW)])
    assert found == [expected] and expected != before


def test_prompts_of_text_to_a_model_for_images():
    model = tiny_vision_model("qwen3_5")
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        for ids in PROMPTS
    ]  # fmt: skip
    found = run(Engine(model, max_context=192), [greedy(ids, count=NEW) for ids in PROMPTS])
    assert found == [out[0, len(ids) :].tolist() for out, ids in zip(expected, PROMPTS, strict=True)]
    assert Engine(model).max_context == model.config.text_config.max_position_embeddings


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels on a CPU's tensors")
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next"])
def test_recorded_steps_in_triton(family, monkeypatch):
    """A whole step by the kernels that a GPU runs, and nothing that waits for it."""
    pytest.importorskip("triton")
    from pronghorn.kernels import decode_attention, delta_step, gated_output, grouped_matmul, matvec

    whole = tiny_mixture(family) if family == "qwen3_next" else tiny_model(family)
    model = adapted(whole)
    requests = [sampled(PROMPTS[0], "first"), sampled(PROMPTS[1][:9], None)]
    expected = [run_tokens(Engine(model, max_context=64), [one])[0][:3] for one in requests]
    monkeypatch.setattr(engine_module, "_runner", CapturedRunner)
    for module in (decode_attention, delta_step, gated_output, grouped_matmul, matvec):
        monkeypatch.setattr(module, "use_triton", lambda tensor, impl: impl != "torch")
    recorded_steps_ask_nothing(monkeypatch)
    short = [replace(one, sampling=replace(one.sampling, max_new_tokens=3)) for one in requests]
    assert_same(run_tokens(Engine(model, max_batch=3, max_context=64), short, [0, 2]), expected)


def test_a_row_without_a_sequence_changes_no_state(model, monkeypatch):
    """A step's rows between those that hold one; the slot that they name belongs to another."""
    monkeypatch.setattr(engine_module, "_runner", CapturedRunner)
    runner = Engine(model, max_batch=2, max_context=64)._runner
    (states,) = runner.cache.states.values()
    found = []
    for rows in (1, 2):
        for held in (states.memory, states.rule):
            held.normal_(generator=torch.Generator().manual_seed(1))
        before = states.rule[1].clone()
        runner.state.zero_()
        runner.state[0, 0], runner.state[2, 0] = 1, 7
        runner.compute(rows)
        assert torch.equal(states.rule[1], before) and not torch.equal(states.rule[0], before)
        found.append((states.memory[0].clone(), states.rule[0].clone()))
    torch.testing.assert_close(*found)


def test_nothing_is_shared(model):
    """The keys of a beginning are of no use without the states behind it."""
    engine = Engine(model, max_context=256, prefix_sharing=True)
    beginning = prompt(7, 130)
    requests = [sampled(beginning + prompt(seed, 5)) for seed in range(2)]
    alone = [run_tokens(Engine(model, max_context=256), [one])[0] for one in requests]
    assert_same(run_tokens(engine, requests, [0, 2]), alone)
    assert not engine._pool.sharing


def test_memory_of_the_states_is_counted(model, monkeypatch, caplog):
    engine = Engine(model, max_batch=2, max_context=64, cache_tokens=128)
    cache, decoder = engine._runner.cache, engine._decoder
    held = sum(s.memory.nbytes + s.rule.nbytes for s in cache.states.values())
    assert held == 3 * state_bytes_per_sequence(decoder)
    assert sum(layer.nbytes for layer in cache.layers) == 128 * cache_bytes_per_token(decoder)
    free = 4 * (64 * state_bytes_per_sequence(decoder) + 1000 * cache_bytes_per_token(decoder))
    monkeypatch.setattr(engine_module, "available_host_bytes", lambda: free)
    with caplog.at_level(logging.WARNING, "pronghorn"):
        small = Engine(model, max_batch=64, max_context=256)
    assert (
        1 < small.max_batch < small.asked_batch == 64
        and f"{small.max_batch} requests at a time, not 64" in caplog.text
    )
    taken = (small.max_batch + 1) * state_bytes_per_sequence(decoder)
    taken += small.total_blocks * 64 * cache_bytes_per_token(decoder)
    assert taken <= free // 4 * 0.8


def test_gated_attention_alone(recorded):
    """No layer keeps a state, and none may go through a launch that knows no gate."""
    model = tiny_model("qwen3_5_text", layer_types=["full_attention"] * 2, seed=6).requires_grad_(False)
    engine = Engine(model, max_batch=4, max_context=192)
    assert engine._pool.sharing and not engine._runner.cache.states
    requests = [greedy(ids, count=NEW) for ids in PROMPTS]
    assert run(engine, requests) == [stock(model, ids, NEW) for ids in PROMPTS]
    assert run(engine, requests[:1]) == [stock(model, PROMPTS[0], NEW)]
