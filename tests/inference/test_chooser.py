"""Tokens drawn by recorded graphs are those of the same draws made launch by launch."""

from __future__ import annotations

import pytest

from pronghorn.inference.engine import Engine
from pronghorn.inference.requests import Request, SamplingParams
from tests.inference.graphs import Graphs
from tests.inference.test_engine import assert_same, prompt, run_tokens
from tests.tiny import tiny_model

KINDS = [
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 5, "logprobs": 2},
]


def request(number, **options):
    return Request(
        prompt(number, 12 + number),
        SamplingParams(max_new_tokens=8, seed=number, **{"logprobs": 1, **options}),
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=3)


@pytest.fixture
def graphs(monkeypatch, captured):
    found = Graphs()
    found.put_in(monkeypatch)
    return found


def drawn(engine):
    return engine._runner.chooser._draws


@pytest.mark.parametrize("options", KINDS)
def test_one_row(model, graphs, monkeypatch, options):
    asked = request(1, **options)
    engine = Engine(model, max_context=256)
    found = run_tokens(engine, [asked])
    assert [draw.uses for draw in drawn(engine).values()] == [8] and graphs.replayed == 7
    monkeypatch.undo()
    assert_same(found, run_tokens(Engine(model, max_context=256), [asked]))


def test_rows_of_several_kinds_that_come_and_go(model, graphs, monkeypatch):
    asked = [request(i, **KINDS[i % 4]) for i in range(6)]
    engine = Engine(model, max_batch=4, max_context=256)
    found = run_tokens(engine, asked, [0, 0, 2, 3, 3, 5])
    assert len(graphs.made) > 2 and graphs.replayed
    monkeypatch.undo()
    assert_same(found, [run_tokens(Engine(model, max_context=256), [one])[0] for one in asked])


def test_penalties_and_many_rows_are_not_recorded(model, graphs, monkeypatch):
    monkeypatch.setattr("pronghorn.inference.chooser.MOST_ROWS", 2)
    engine = Engine(model, max_batch=4, max_context=256)
    run_tokens(engine, [request(1, temperature=1.0, repetition_penalty=1.3)])
    run_tokens(engine, [request(i, **KINDS[0]) for i in range(3)])
    assert not graphs.made and not drawn(engine)


def test_without_memory_for_a_recording(model, graphs, monkeypatch, caplog):
    graphs.memory = False
    engine = Engine(model, max_context=256)
    found = run_tokens(engine, [request(1, **KINDS[0])])
    assert caplog.text.count("draws of tokens could not be recorded") == 1 and not drawn(engine)
    monkeypatch.undo()
    assert_same(found, run_tokens(Engine(model, max_context=256), [request(1, **KINDS[0])]))
