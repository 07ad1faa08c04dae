"""Prompts in recorded passes of whole blocks: what is computed beyond their end shows nowhere.

Without a GPU they are computed anew each time; what a graph does is played by a stand-in.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from pronghorn.inference import prompts
from pronghorn.inference.engine import Engine
from tests.inference.graphs import Graphs
from tests.inference.test_engine import assert_same, prompt, run_tokens, sampled
from tests.inference.test_engine_adapters import nf4, with_adapters
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return with_adapters(tiny_model("llama"), {"first": 4, "second": 8})


def sizes_of(engine):
    return [tuple(shape) for shape in engine._runner.prompts._prompts]


@pytest.mark.parametrize("adapter", [None, "second"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127])
def test_answers_are_those_of_the_prompt_alone(model, captured, monkeypatch, adapter, length):
    """Answers go on into the block that the padding lies in, and beyond it."""
    requests = [sampled(prompt(7 + i, length), adapter) for i in range(2)]
    engine = Engine(model, max_context=256)
    found = [run_tokens(engine, [request])[0] for request in requests]
    assert sizes_of(engine) == [(64 if length <= 64 else 128, 0, adapter)]
    monkeypatch.undo()
    assert_same(found, [run_tokens(Engine(model, max_context=256), [request])[0] for request in requests])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text", "phi3", "cohere", "olmo2"])
def test_families(family, captured, monkeypatch):
    model, request = tiny_model(family, seed=1), sampled(prompt(3, 70))
    engine = Engine(model, max_context=256)
    found = run_tokens(engine, [request])
    assert sizes_of(engine) == [(128, 0, None)]
    monkeypatch.undo()
    assert_same(found, run_tokens(Engine(model, max_context=256), [request]))


def test_weights_in_four_bits(captured, monkeypatch):
    model, request = nf4(tiny_model("llama")), sampled(prompt(3, 70))
    engine = Engine(model, max_context=256)
    found = run_tokens(engine, [request])
    assert sizes_of(engine) == [(128, 0, None)]
    monkeypatch.undo()
    assert_same(found, run_tokens(Engine(model, max_context=256), [request]))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_5_text", "youtu"])
def test_what_is_not_recorded(family, captured):
    engine = Engine(tiny_model(family, seed=1), max_context=256)
    assert run_tokens(engine, [sampled(prompt(3, 70))])[0]
    assert not sizes_of(engine)


def test_what_comes_together_or_is_long(model, captured, monkeypatch):
    monkeypatch.setattr(prompts, "MOST_TOKENS", 128)
    monkeypatch.setattr(prompts, "LEAST_CONTEXT", 128)
    monkeypatch.setattr(prompts, "MOST_CONTEXT", 128)
    engine = Engine(model, max_context=256)
    run_tokens(engine, [sampled(prompt(1, 20)), sampled(prompt(2, 20))])
    assert not sizes_of(engine)
    run_tokens(engine, [sampled(prompt(3, 100))])
    run_tokens(engine, [sampled(prompt(3, 100))])  # its first block is found in the cache
    run_tokens(engine, [sampled(prompt(4, 129))])
    run_tokens(engine, [sampled((*prompt(3, 100), *prompt(5, 29)))])
    assert sizes_of(engine) == [(128, 0, None), (64, 128, None)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "cohere"])
@pytest.mark.parametrize("adapter", [None, "second"])
def test_turns_of_a_conversation(family, adapter, captured, monkeypatch):
    """Each begins with all of the one before, whose answer wrote over its padding; other prompts come between."""
    monkeypatch.setattr(prompts, "LEAST_CONTEXT", 128)
    model = tiny_model(family, seed=2, **({"sliding_window": 40} if family == "gemma3_text" else {}))
    if adapter is not None:
        model = with_adapters(model, {"first": 4, "second": 8})
    engine = Engine(model, max_context=512)
    turns, text = [], prompt(8, 70)
    for turn in range(5):
        turns.append(sampled(text, adapter))
        answer = run_tokens(engine, turns[-1:])[0]
        run_tokens(engine, [sampled(prompt(90 + turn, 75), adapter)])
        turns[-1] = turns[-1], answer
        text = (*text, *(token.id for token in answer), *prompt(20 + turn, 31))
    sizes = sizes_of(engine)
    assert {context for _, context, _ in sizes} >= {0, 256, 512}, sizes
    monkeypatch.undo()
    eager = Engine(model, max_context=512)
    for asked, answer in turns:
        assert_same([answer], run_tokens(eager, [asked]))


def test_weights_that_were_trained_are_read(captured):
    model = tiny_model("llama")
    engine, request = Engine(model, max_context=256), sampled(prompt(3, 40))
    before = run_tokens(engine, [request])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.neg_()
    after = run_tokens(engine, [request])
    assert [t.id for t in after[0]] != [t.id for t in before[0]]
    assert_same(after, run_tokens(Engine(model, max_context=256), [request]))


def test_few_are_kept(model, captured, monkeypatch):
    monkeypatch.setattr(prompts, "MOST_KEPT", 2)
    engine = Engine(model, max_context=256)
    for length, adapter in ((10, None), (70, None), (11, None), (10, "first")):
        run_tokens(engine, [sampled(prompt(length, length), adapter)])
    assert sizes_of(engine) == [(64, 0, None), (64, 0, "first")]


@pytest.fixture
def graphs(monkeypatch, captured):
    """Graphs that a CPU has."""
    found = Graphs()
    found.put_in(monkeypatch)
    return found


def test_the_second_that_goes_on_is_recorded(model, graphs, monkeypatch):
    monkeypatch.setattr(prompts, "LEAST_CONTEXT", 128)
    beginning = prompt(40, 150)
    requests = [sampled((*beginning, *prompt(50 + i, 20 + i))) for i in range(4)]
    engine = Engine(model, max_context=256)
    found = [run_tokens(engine, [request])[0] for request in requests]
    assert sizes_of(engine) == [(192, 0, None), (64, 256, None)] and graphs.made.count("prompts") == 1
    monkeypatch.undo()
    assert_same(found, [run_tokens(Engine(model, max_context=256), [request])[0] for request in requests])


def test_the_second_of_a_size_is_recorded(model, graphs, monkeypatch):
    requests = [sampled(prompt(20 + i, 30 + i)) for i in range(4)]
    engine = Engine(model, max_context=256)
    found, made = [], []
    for request in requests:
        found += run_tokens(engine, [request])
        made.append(graphs.made.count("prompts"))
    assert made == [0, 1, 1, 1]
    monkeypatch.undo()
    assert_same(found, [run_tokens(Engine(model, max_context=256), [request])[0] for request in requests])


def test_a_first_prompt_that_fails_half_way_is_none(model, graphs, monkeypatch):
    """What a kernel makes when it is first launched must not be made by a recording."""
    requests = [sampled(prompt(20 + i, 30 + i)) for i in range(3)]
    engine = Engine(model, max_context=256)

    def fail(*_):
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as failing:
        failing.setattr(prompts, "logits_of", fail)
        number = engine.submit(requests[0])
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
        engine.cancel(number)
        while engine.has_work:
            engine.step()
    made = []
    for request in requests:
        run_tokens(engine, [request])
        made.append(graphs.made.count("prompts"))
    assert made == [0, 1, 1]


def test_prompts_are_recorded_again_after_training(graphs, caplog):
    """All of the graphs are gone then, and torch takes no further one into what was their pool."""
    model = tiny_model("llama")
    engine, requests = Engine(model, max_context=256), [sampled(prompt(20 + i, 30 + i)) for i in range(3)]
    for made in (1, 2):
        found = [run_tokens(engine, [request])[0] for request in requests]
        assert graphs.made.count("prompts") == made and "could not be recorded" not in caplog.text
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.neg_()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.neg_()
    assert_same(found, [run_tokens(Engine(model, max_context=256), [request])[0] for request in requests])


def test_memory_goes_with_the_engine(model, captured):
    """The cache's, before a larger one is made; not when Python looks for cycles."""
    engine = Engine(model, max_context=256)
    run_tokens(engine, [sampled(prompt(1, 40))])
    cache = weakref.ref(engine._runner.cache)
    gc.disable()
    try:
        del engine
        assert cache() is None
    finally:
        gc.enable()


def test_without_memory_for_a_recording(model, graphs, monkeypatch, caplog):
    graphs.memory = False
    requests = [sampled(prompt(20 + i, 30 + i)) for i in range(3)]
    engine = Engine(model, max_context=256)
    found = [run_tokens(engine, [request])[0] for request in requests]
    assert caplog.text.count("prompts could not be recorded (no memory left)") == 1
    assert graphs.stream == "first"
    monkeypatch.undo()
    assert_same(found, [run_tokens(Engine(model, max_context=256), [request])[0] for request in requests])


def test_a_recording_that_gives_something_else_is_not_used(model, graphs, monkeypatch, caplog):
    graphs.factor = 0.9
    requests = [sampled(prompt(20 + i, 30 + i)) for i in range(3)]
    engine = Engine(model, max_context=256)
    found = [run_tokens(engine, [request])[0] for request in requests]
    assert (
        caplog.text.count("recorded prompts give other logits than launched ones (by 0.1 of the largest)")
        == 1
    )
    assert graphs.made.count("prompts") == 1
    monkeypatch.undo()
    assert_same(found, [run_tokens(Engine(model, max_context=256), [request])[0] for request in requests])
