"""Decoding in recorded steps that run ahead of the host, and fused products with adapters by row: the same answers.

Without a GPU the steps are computed anew each time, with the torch reference of every kernel.
"""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig

from pronghorn.inference import fused
from pronghorn.inference.captured import TURNS, InFlight, _Step
from pronghorn.inference.engine import Engine
from pronghorn.inference.requests import Request, SamplingParams
from pronghorn.kernels.walk import walk
from tests.inference.test_engine import (
    NEW,
    PROMPTS,
    assert_same,
    greedy,
    prompt,
    run,
    run_tokens,
    sampled,
)
from tests.inference.test_engine_adapters import fp8, int8, nf4, with_adapters
from tests.tiny import FAMILIES, tiny_model


@pytest.fixture(scope="module")
def model():
    return with_adapters(tiny_model("llama"), {"first": 4, "second": 8})


ADAPTERS = [None, "first", "second", "first", None]
REQUESTS = [sampled(ids, adapter) for ids, adapter in zip(PROMPTS, ADAPTERS, strict=True)]


@pytest.fixture(scope="module")
def alone(model):
    """Each request's answer from an eager engine of its own."""
    return [run_tokens(Engine(model, max_context=256), [request])[0] for request in REQUESTS]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families(family, captured, monkeypatch):
    model = tiny_model(family, seed=1)
    requests = [sampled(ids) for ids in PROMPTS[1:4]]
    found = run_tokens(Engine(model, max_batch=4, max_context=256), requests)
    monkeypatch.undo()
    assert_same(found, run_tokens(Engine(model, max_batch=4, max_context=256), requests))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_all_between_two_attentions_at_once(family, captured, monkeypatch):
    model, walked = tiny_model(family, seed=1).requires_grad_(False), []
    monkeypatch.setattr(fused, "walk", lambda *a, **k: (walked.append(1), walk(*a, **k))[1])
    requests = [sampled(ids) for ids in PROMPTS[1:3]]
    found = [run_tokens(Engine(model, max_batch=1, max_context=256), [request])[0] for request in requests]
    assert bool(walked) == (family != "gemma2")  # which has norms behind its products
    monkeypatch.undo()
    assert_same(found, run_tokens(Engine(model, max_batch=4, max_context=256), requests))


@pytest.mark.parametrize("lost", [1, 5])
@pytest.mark.parametrize("most", [1, 2])
def test_a_lost_step_is_done_again(lost, most, captured, monkeypatch, caplog):
    """Programs that wait for each other in vain leave anything behind, and count it."""
    model, steps = tiny_model("llama", seed=1).requires_grad_(False), []

    def fails(attended, x, steps_, meeting, **kwargs):
        y = walk(attended, x, steps_, meeting, **kwargs)
        if steps_ is steps_of[-1]:
            steps.append(1)
        if len(steps) >= lost:
            meeting.lost.add_(1)
            x.fill_(7.0)
            y.fill_(float("nan"))
        return y

    requests = [sampled(PROMPTS[1]), greedy(PROMPTS[2])]
    alone = [run_tokens(Engine(model, max_batch=4, max_context=256), [request])[0] for request in requests]
    monkeypatch.setattr(fused, "walk", fails)
    engine = Engine(model, max_batch=most, max_context=256)
    steps_of = engine._runner.fused.walks
    assert steps_of
    found = run_tokens(engine, requests, arrivals=[0, 9])
    assert [[t.id for t in answer] for answer in found] == [[t.id for t in answer] for answer in alone]
    assert not engine._runner.fused.walks and len(steps) <= lost + 1
    assert caplog.text.count("waited for each other in vain") == 1


@pytest.mark.parametrize("blocks", [4, 9, 64])
def test_adapters_arrivals_and_few_blocks(model, alone, blocks, captured):
    numbers = random.Random(blocks)
    engine = Engine(model, max_batch=3, max_context=256, cache_tokens=blocks * 64)
    assert engine._runner.runs_ahead
    arrivals = [numbers.randrange(20) for _ in REQUESTS]
    assert_same(run_tokens(engine, REQUESTS, arrivals), alone)


def test_slots_are_packed_when_most_have_left(model, alone, captured):
    engine = Engine(model, max_batch=8, max_context=256)
    short = [Request(ids, SamplingParams(max_new_tokens=2)) for ids in PROMPTS]
    sizes = []
    step = engine._runner._send
    engine._runner._send = lambda sequences, size: (sizes.append(size), step(sequences, size))[1]
    assert_same(run_tokens(engine, [*short[:4], REQUESTS[4]])[4:], alone[4:])
    assert sizes[0] == 8 and sizes[-1] == 1


@pytest.mark.parametrize("count", range(2, 2 + TURNS))
def test_a_size_is_recorded_while_a_step_is_on_its_way(count, model, captured, monkeypatch):
    """What is computed for a recording is told to nobody, whichever turn has not been read yet."""
    requests = [greedy(PROMPTS[1]), greedy(PROMPTS[2], count=count)]
    alone = [run(Engine(model, max_batch=1, max_context=256), [request])[0] for request in requests]
    made = _Step.__init__
    monkeypatch.setattr(_Step, "__init__", lambda step, *given: (made(step, *given), step.rehearse())[0])
    engine = Engine(model, max_batch=2, max_context=256)
    assert run(engine, requests) == alone
    assert list(engine._runner._steps) == [2, 1]


def test_a_stop_is_seen_one_step_late_and_nothing_follows_it(model, captured, monkeypatch):
    engine = Engine(model, max_context=256)
    free = run(engine, [greedy(PROMPTS[0])])[0]
    stop = free[3]
    request = Request(PROMPTS[0], SamplingParams(max_new_tokens=NEW, stop_token_ids=(stop,)))
    assert run(engine, [request, greedy(PROMPTS[1])])[0] == free[: free.index(stop) + 1]


def test_penalties_see_the_token_before(model, captured, monkeypatch):
    requests = [
        Request(ids, SamplingParams(max_new_tokens=12, repetition_penalty=1.8)) for ids in PROMPTS[:2]
    ]
    found = run(Engine(model, max_context=256), requests)
    monkeypatch.undo()
    assert found == run(Engine(model, max_context=256), requests)


def test_cancelling_with_a_step_on_its_way(model, alone, captured):
    engine = Engine(model, max_context=256)
    first, second = engine.submit(REQUESTS[4]), engine.submit(REQUESTS[1])
    answer = []
    for _ in range(4):
        answer += [t for e in engine.step() if e.request_id == second for t in e.tokens]
    engine.cancel(first)
    third = engine.submit(REQUESTS[0])  # takes the slot and the blocks
    others = []
    while engine.has_work:
        for event in engine.step():
            answer += event.tokens if event.request_id == second else ()
            others += event.tokens if event.request_id == third else ()
    assert_same([answer, others], [alone[1], alone[0]])


@pytest.mark.parametrize("store", [nf4, fp8, int8])
def test_weights_in_codes(store, captured, monkeypatch):
    model = with_adapters(store(tiny_model("llama")), {"first": 4, "second": 8})
    found = run_tokens(Engine(model, max_batch=3, max_context=256), REQUESTS[:3], [0, 1, 1])
    monkeypatch.undo()
    assert_same(found, [run_tokens(Engine(model, max_context=256), [request])[0] for request in REQUESTS[:3]])


def test_trained_adapters_are_put_in_the_tables_that_steps_read(captured):
    model = with_adapters(tiny_model("llama"), {"first": 4, "second": 8})
    engine = Engine(model, max_context=256)
    request = sampled(prompt(3, 40), "first")
    before = run(engine, [request])
    steps, places = dict(engine._runner._steps), [t.a.data_ptr() for t in engine._runner.fused.tables() if t]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.first" in name:
                parameter.mul_(-1.0)
    after = run(engine, [request])
    assert after != before and after == run(Engine(model, max_context=256), [request])
    assert engine._runner._steps == steps
    assert places == [t.a.data_ptr() for t in engine._runner.fused.tables() if t]
    with torch.no_grad():
        model.get_base_model().lm_head.weight.data = model.get_base_model().lm_head.weight.data.clone()
    engine.refresh()
    assert not engine._runner._steps


def test_trained_biases_are_seen(captured):
    """Biases that could be trained lie side by side, too, and are written to by nobody but who trains them."""
    model = tiny_model("qwen2").requires_grad_(True)
    engine = Engine(model, max_context=256)
    request = sampled(prompt(3, 40))
    before = run(engine, [request])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.add_(torch.linspace(-2.0, 2.0, len(parameter)))
    after = run_tokens(engine, [request])
    assert_same(after, run_tokens(Engine(model, max_context=256), [request]))
    assert [token.id for token in after[0]] != before[0]
    assert not engine._decoder.refresh()


def test_an_adapter_that_steps_cannot_be_recorded_for(captured, caplog):
    model = with_adapters(tiny_model("llama"), {"first": 4})
    engine = Engine(model, max_context=256)
    request = sampled(prompt(3, 40), "first")
    before = run(engine, [request])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, bias="lora_only"))
    assert run(engine, [request]) == before
    assert "operation by operation" in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_that_could_be_trained_walks(family, captured, tmp_path):
    """Its weights lie side by side while it answers; it is trained and saved as before."""
    model = tiny_model(family)
    request = greedy(PROMPTS[0])
    engine = Engine(model, max_batch=1, max_context=256)
    assert len(engine._runner.fused.walks) == len(model.model.layers)
    before = run_tokens(engine, [request])
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.requires_grad
    assert (
        attention.k_proj.weight.untyped_storage()._cdata == attention.q_proj.weight.untyped_storage()._cdata
    )
    model(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5, fused=True).step()
    after = run_tokens(engine, [request])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    again = run_tokens(Engine(loaded, max_batch=1, max_context=256), [request])
    tokens = [[token.id for token in answers[0]] for answers in (before, after, again)]
    assert tokens[0] != tokens[1] == tokens[2]


def test_after_a_step_that_fails_answers_go_on(model, alone, captured, monkeypatch):
    """Memory that runs out while a larger step is recorded, with another step under way."""
    engine = Engine(model, max_batch=4, max_context=256)
    steps = []

    def run(step):
        steps.append(step.size)
        if len(steps) == 4:
            raise torch.OutOfMemoryError("no memory left")
        return step.runner.compute(step.size)

    monkeypatch.setattr("pronghorn.inference.captured._Step.run", run)
    numbers = [engine.submit(request) for request in REQUESTS[:2]]
    answers = {number: [] for number in numbers}
    failed = 0
    while engine.has_work:
        try:
            events = engine.step()
        except torch.OutOfMemoryError:
            failed += 1
            continue
        for event in events:
            answers[event.request_id] += event.tokens
    assert failed == 1
    assert_same([answers[number] for number in numbers], alone[:2])


def test_decoding_begins_before_the_first_token_is_read(model, alone, captured, monkeypatch):
    engine = Engine(model, max_batch=2, max_context=256)
    order = []
    tokens, decode = InFlight.tokens, engine._runner.decode
    monkeypatch.setattr(InFlight, "tokens", lambda step: (order.append("read"), tokens(step))[1])
    engine._runner.decode = lambda sequences: (order.append("launch"), decode(sequences))[1]
    # The first step of all takes its time: the token is told before it is recorded.
    for first in (["read", "launch"], ["launch", "read"]):
        order.clear()
        found = run_tokens(engine, REQUESTS[:1])
        assert_same(found, alone[:1])
        assert order == [*first, *["launch", "read"] * (NEW - 2), "read"]


@pytest.mark.parametrize("count", [1, 2])
def test_short_answers_of_several_that_are_cancelled_and_come_later(model, captured, monkeypatch, count):
    """A prompt whose token nobody has read yet gives its slot and blocks to the next one."""
    requests = [greedy(ids, count=count) for ids in PROMPTS]
    alone = [run(Engine(model, max_context=256), [request])[0] for request in requests]
    engine = Engine(model, max_batch=2, max_context=256, cache_tokens=6 * 64)
    gone = engine.submit(greedy(PROMPTS[1], count=9))
    assert engine.step() == [], "its token is on its way"
    engine.cancel(gone)
    numbers = [engine.submit(request) for request in requests]
    answers = {number: [] for number in numbers}
    while engine.has_work:
        for event in engine.step():
            assert event.request_id in answers or event.finish_reason == "cancelled"
            answers.setdefault(event.request_id, []).extend(token.id for token in event.tokens)
    assert [answers[number] for number in numbers] == alone and not answers[gone]
    assert engine.free_blocks == engine.total_blocks and not engine.has_work
