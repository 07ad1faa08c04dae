"""Decoding with and without walks, on the CPU by their torch reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import walk
from benchmarks.models import write_checkpoint
from benchmarks.side import RESULT_PREFIX
from pronghorn.inference import engine as engine_module
from pronghorn.inference.captured import CapturedRunner


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[tuple[str, str], dict[str, Any]]:
    """Both ways of both adapters, in steps as they are recorded on a GPU."""
    checkpoint = write_checkpoint("tiny", tmp_path_factory.mktemp("checkpoint"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_runner", CapturedRunner)
        return {
            (adapter, way): walk.measure(checkpoint, adapter=adapter, way=way, prompt=12, new=9, repeats=2)
            for adapter in walk.ADAPTERS
            for way in walk.WAYS
        }


def test_a_merged_model_walks_and_answers_the_same(rows) -> None:
    walked, other = rows["merged", "walk"], rows["merged", "launches"]
    assert (walked["walks"], other["walks"]) == (2, 0), "one a layer"
    assert len(walked["tokens"]) == len(walked["logprobs"]) == 9
    assert walked["decode_per_s"] > 0 and len(walked["decode_per_s_all"]) == 2
    found = walk.compare(walked, other)
    assert found["alike"] == found["new"] == 9 and found["apart"] is None
    assert found["logprobs_differ"] < 0.05
    assert all(gap >= 0 for gap in walked["apart"])


def test_an_unmerged_adapter_walks(rows) -> None:
    assert rows["unmerged", "walk"]["walks"] == rows["merged", "walk"]["walks"] == 2
    assert rows["unmerged", "walk"]["tokens"] == rows["unmerged", "launches"]["tokens"]
    merged, unmerged = (
        torch.tensor(rows[adapter, "walk"]["logprobs"][:1]) for adapter in ("merged", "unmerged")
    )
    torch.testing.assert_close(merged, unmerged, atol=0.1, rtol=0)


def test_answers_are_compared_up_to_where_they_part() -> None:
    one = {"tokens": [4, 5, 6, 7], "logprobs": [-1.0, -2.0, -3.0, -9.0], "apart": [1.0, 1.0, 1.0, 1.0]}
    two = {"tokens": [4, 5, 8, 7], "logprobs": [-1.0, -2.5, -3.0, -1.0], "apart": [1.0, 1.0, 0.01, 1.0]}
    assert walk.compare(one, two) == {"alike": 2, "new": 4, "logprobs_differ": 0.5, "apart": 0.01}
    assert walk.compare(one, one)["apart"] is None


def test_without_a_gpu_it_says_so(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert walk.main(["--model", "tiny"]) == 0
    assert "there is no GPU here" in capsys.readouterr().out


def test_the_table_and_what_is_left_out(rows, tmp_path: Path, monkeypatch, capsys) -> None:
    asked = []

    def process(module: str, arguments: list[str], **_: Any) -> tuple[int, str]:
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        asked.append((given["--model"], given["--adapter"], given["--way"]))
        if len(asked) > 3:
            return 1, "Killed"
        row = rows[given["--adapter"], given["--way"]]
        without = {"walks": 0} if given["--adapter"] == "unmerged" else {}
        return 0, RESULT_PREFIX + json.dumps(row | without)

    monkeypatch.setattr(walk, "run_module", process)
    monkeypatch.setattr(walk, "is_gpu", lambda: True)
    monkeypatch.setattr(walk, "checkpoint_folder", lambda *_: tmp_path)
    assert walk.main(["--model", "tiny", "--layers", "2", "--json"]) == 0
    assert [(adapter, way) for _, adapter, way in asked] == [
        ("merged", "walk"), ("merged", "launches"), ("unmerged", "walk"),
    ]  # fmt: skip
    assert {model for model, _, _ in asked} == {"tiny-2-layers"}
    out = capsys.readouterr().out
    assert "9 of 9" in out and "unmerged: no walk is found" in out and "2 walks a step" in out
    assert len([line for line in out.splitlines() if line.startswith("{")]) == 3
    assert walk.main(["--model", "tiny", "--adapters", "merged"]) == 1, "one that fails ends no other"
    assert len(asked) == 5 and "exit status 1: Killed" in capsys.readouterr().out
