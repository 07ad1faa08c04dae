"""A search tries every setting from the same start, keeps the best, goes on where it stopped, leaves the base alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel

from pronghorn.errors import SearchChanged, SearchFailed, SearchInvalid
from pronghorn.experiments.search import Space, search, steps_of
from pronghorn.experiments.search.journal import JOURNAL
from pronghorn.experiments.search.swapping import adapted
from tests.experiments.searches import SPACE, load, outcome, task
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The grid in one go, and the base it ran on."""
    folder, base = tmp_path_factory.mktemp("whole"), load()
    told: list[Any] = []
    result = search(task(load=lambda: base), Space(SPACE), folder, on_trial=told.append)
    return result, base[0], told


def test_a_grid_is_tried_and_its_best_is_kept(whole, tmp_path):
    result, _, told = whole
    assert [trial.settings for trial in result.trials] == Space(SPACE).grid() and list(result.trials) == told
    assert all(trial.status == "done" and trial.steps == 3 and trial.score == trial.loss for trial in told)
    assert len({trial.score for trial in told}) == 4, "every setting does something"
    assert result.best == min(told, key=lambda trial: trial.score) == result.ranked[0]
    assert result.best.loss < result.before and result.best.number in result.pareto
    assert all(trial.seconds > 0 and trial.tokens_per_second > 0 for trial in told)
    assert [path.name for path in result.folder.glob("adapter*")] == [f"adapter-{result.best.number}"]
    model = PeftModel.from_pretrained(tiny_model("llama"), result.adapter)
    assert model.peft_config["default"].r == result.best.settings["r"]
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name), "it is trained"


def test_the_base_is_untouched_bit_for_bit(whole):
    fresh, after = tiny_model("llama").state_dict(), whole[1].state_dict()
    assert fresh.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in fresh.items())


@pytest.mark.parametrize(
    "adapter",
    [
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"bias": "all"},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
    ],
)
def test_what_an_adapter_trains_of_the_base_is_put_back(adapter):
    base = tiny_model("qwen2")  # it has biases
    tensors = {name: value.data_ptr() for name, value in base.named_parameters()}
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with adapted(base, r=2, **adapter) as model, torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    after = base.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(value, after[name]) for name, value in before.items()
    )
    assert tensors == {name: value.data_ptr() for name, value in base.named_parameters()}, "nor written to"
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_an_interrupted_search_goes_on(whole, tmp_path):
    result, told = whole[0], []
    lines = (result.folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(b"".join(lines[:3]) + lines[3][:40])
    again = search(task(), Space(SPACE), tmp_path, on_trial=told.append)
    assert [trial.number for trial in told] == [2, 3]
    assert list(map(outcome, again.trials)) == list(map(outcome, result.trials))
    assert len((tmp_path / JOURNAL).read_bytes().splitlines()) == 5


def test_a_trial_does_not_depend_on_those_before(whole, tmp_path):
    """Another order, another sampler: the same settings come to the same."""
    known = {json.dumps(trial.settings): outcome(trial) for trial in whole[0].trials}
    other = search(task(), Space(SPACE), tmp_path, sampler="random", trials=2).trials
    assert [trial.settings for trial in other] != Space(SPACE).grid()[:2]
    for trial in other:
        assert outcome(trial) == {**known[json.dumps(trial.settings)], "number": trial.number}


@pytest.mark.parametrize(
    "space,rows,what",
    [({"r": [2]}, 12, "space"), (SPACE, 11, "rows")],
)
def test_trials_of_another_search_are_refused(whole, space, rows, what):
    with pytest.raises(SearchChanged, match=f"of another {what}"):
        search(task(rows=rows), Space(space), whole[0].folder)


def test_another_model_is_refused(whole):
    with pytest.raises(SearchChanged, match='of another model: "LlamaForCausalLM'):
        search(task(load=partial(load, seed=1)), Space(SPACE), whole[0].folder)


def rank_of(model: Any, tokenizer: Any, held_out: Any) -> float:
    """A metric that grows with the rank, and has troubles of its own."""
    rank = int(model.peft_config["default"].r)
    assert not model.training and len(held_out) == 4 and tokenizer.eos_token
    if rank == 8:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return math.nan if rank == 4 else float(rank)


def test_a_setting_that_fails_does_not_end_the_search(tmp_path):
    space = Space({"r": [8, 4, 1, 2], "learning_rate": [1e-2]})
    result = search(task(steps=1, metric=rank_of, maximize=True), space, tmp_path)
    assert [trial.status for trial in result.trials] == ["failed", "failed", "done", "done"]
    assert result.best.settings["r"] == 2 and result.best.score == 2.0 and result.best.loss < result.before
    assert [trial.reason for trial in result.trials[:2]] == [
        "memory: CUDA out of memory. Tried to allocate 2.00 GiB",
        "the metric is nan",
    ]
    assert [trial.number for trial in result.ranked] == [3, 2, 0, 1]


def test_a_rate_without_a_number_fails(tmp_path):
    result = search(task(), Space({"learning_rate": [1e38]}), tmp_path)
    assert result.trials[0].status == "failed" and "nan" in result.trials[0].reason
    assert result.best is None and result.adapter is None and not list(tmp_path.glob("adapter*"))


def test_a_metric_that_raises_is_told(tmp_path):
    def broken(*_: Any) -> float:
        raise KeyError("answer")

    with pytest.raises(SearchFailed, match="broken raised KeyError: 'answer'"):
        search(task(metric=broken), Space({"r": [1]}), tmp_path)


def merged(model: Any, tokenizer: Any, held_out: Any) -> float:
    model.merge_adapter()
    return 1.0


def test_a_trial_that_changes_the_base_is_told(tmp_path):
    with pytest.raises(SearchFailed, match=r"trial 0 has changed the base.*no merging"):
        search(task(metric=merged), Space({"r": [1, 2]}), tmp_path)


def test_steps_follow_the_batch():
    """Every trial sees as many rows: those of 3 steps of 4 rows."""
    space = Space({"per_device_train_batch_size": [2, 5], "gradient_accumulation_steps": [1, 2]})
    assert [steps_of(task().settings, settings) for settings in space.grid()] == [6, 3, 3, 2]
    assert steps_of(task(steps=-1).settings, {"per_device_train_batch_size": 2}) == -1, (
        "epochs are rows already"
    )


def test_what_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(SearchInvalid, match=r"no sampler 'tpee'.*did you mean 'tpe'"):
        search(task(), Space(SPACE), tmp_path, sampler="tpee")
    with pytest.raises(SearchInvalid, match="workers cannot be 0"):
        search(task(), Space(SPACE), tmp_path, workers=0)
    with pytest.raises(SearchInvalid, match="micro-batch of 13 rows is more than the 12"):
        search(task(), Space({"per_device_train_batch_size": [4, 13]}), tmp_path)
    with pytest.raises(SearchInvalid, match="without held-out rows"):
        replace(task(), held_out=None)
    with pytest.raises(SearchInvalid, match="which is to be low"):
        task(maximize=True)
    assert not list(tmp_path.glob("*"))
