"""Answers over HTTP, with an engine that says what it is told to."""

from __future__ import annotations

import pytest

from tests.inference.server.fakes import FakeEngine, saying, served_model
from tests.inference.server.running import ask, running


@pytest.fixture(scope="module")
def server():
    engine = FakeEngine(saying("Grass, sagebrush and cactus."))
    with running(lambda: (engine, served_model())) as found:
        found.engine = engine
        yield found


def test_an_answer(server):
    status, _, answer = ask(server, model="tiny")
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Grass, sagebrush and cactus.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = answer["usage"]
    request = server.engine.submitted[-1]
    assert usage["prompt_tokens"] == len(request.prompt_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    tokenizer = served_model().tokenizer
    assert tokenizer.decode(request.prompt_ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
