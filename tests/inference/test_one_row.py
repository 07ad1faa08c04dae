"""One row on a CPU: by whichever products are faster, with the same tokens."""

from __future__ import annotations

import threading

import pytest
import torch

from pronghorn.inference import one_row, runner
from pronghorn.inference.engine import Engine
from pronghorn.inference.requests import Request, SamplingParams
from tests.inference.test_engine import PROMPTS, run
from tests.tiny import tiny_model


@pytest.fixture
def enabled() -> bool:
    """What torch's switch says before."""
    return bool(torch.backends.mkldnn.enabled)


def test_the_switch_is_put_back_when_the_last_one_leaves(enabled: bool) -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with one_row.without_onednn():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with one_row.without_onednn():
        thread.start()
        assert inside.wait(10) and not torch.backends.mkldnn.enabled
    assert not torch.backends.mkldnn.enabled
    leave.set()
    thread.join()
    assert torch.backends.mkldnn.enabled == enabled
    with pytest.raises(ValueError, match="stop"), one_row.without_onednn():
        raise ValueError("stop")
    assert torch.backends.mkldnn.enabled == enabled


def test_what_is_tried(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not one_row.is_faster_without_onednn(None)
    assert not one_row.is_faster_without_onednn(torch.zeros(64, 64))
    for own, theirs in ((1.0, 2.0), (2.0, 1.0)):
        taken = iter((own, theirs))
        monkeypatch.setattr(one_row, "_seconds", lambda x, weight, taken=taken: next(taken))
        assert one_row.is_faster_without_onednn(torch.zeros(64, 64, dtype=torch.bfloat16)) == (own < theirs)
    assert torch.backends.mkldnn.enabled == enabled


def test_the_same_tokens_either_way(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and in company, which is no single row."""
    model, answers = tiny_model("llama", dtype=torch.bfloat16), []
    for faster in (True, False):
        seen: list[bool] = []
        decode = runner.decode

        def watched(*arguments, seen=seen, decode=decode):
            seen.append(bool(torch.backends.mkldnn.enabled))
            return decode(*arguments)

        monkeypatch.setattr(runner, "decode", watched)
        monkeypatch.setattr(runner, "is_faster_without_onednn", lambda weight, faster=faster: faster)
        engine = Engine(model)
        alone = [Request(PROMPTS[1], SamplingParams(max_new_tokens=6))]
        found = run(engine, alone)
        assert set(seen) == {not faster and enabled}
        seen.clear()
        found += run(engine, [Request(ids, SamplingParams(max_new_tokens=4)) for ids in PROMPTS[:2]])
        assert set(seen) == {enabled}
        answers.append(found)
        monkeypatch.setattr(runner, "decode", decode)
    assert answers[0] == answers[1]
