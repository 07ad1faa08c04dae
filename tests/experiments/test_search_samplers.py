"""Spaces are read strictly; samplers give each point once, go on after earlier trials, and TPE prunes what is bad."""

from __future__ import annotations

import sys
from itertools import islice

import pytest

from pronghorn.errors import PackageMissing, SearchInvalid
from pronghorn.experiments.search import Range, Space, Trial, search
from pronghorn.experiments.search.samplers import sampler_named
from pronghorn.experiments.search.trial import pareto, ranked
from tests.experiments.searches import task


def done(number, settings, score, seconds=1.0, memory=1):
    return Trial(number, settings, "done", score=score, loss=score, seconds=seconds, memory=memory)


def test_space_is_read():
    space = Space.parse(["learning_rate=1e-4,3e-4", "r=6..40", "lora_alpha=16"])
    assert space.axes == {"learning_rate": (1e-4, 3e-4), "r": (8, 16, 32), "lora_alpha": (16.0,)}
    assert space.size == len(space.grid()) == 6
    assert space.grid()[1] == {"learning_rate": 1e-4, "r": 16, "lora_alpha": 16.0}
    assert type(space.grid()[0]["r"]) is int
    rates = Space.parse(["learning_rate=1e-5..1e-2", "r=8,8"])
    assert rates.axes == {"learning_rate": Range(1e-5, 1e-2), "r": (8,)} and rates.size is None


@pytest.mark.parametrize(
    "texts,told",
    [
        ([], "nothing varies"),
        (["rank=8"], "'rank' is no setting that a search varies"),
        (["learning_rte=8"], "did you mean 'learning_rate'"),
        (["r"], "'r' names no values"),
        (["r="], "'r' has no values"),
        (["r=8,x"], "'x' is no value of 'r'"),
        (["r=8", "r=16"], "'r' is given twice"),
        (["r=0"], "'r' cannot be 0. Fix: give a whole number from 1"),
        (["r=2.5"], "'r' cannot be 2.5"),
        (["learning_rate=0"], "'learning_rate' cannot be 0. Fix: give a number above 0"),
        (["learning_rate=-1e-3"], "cannot be -0.001"),
        (["learning_rate=nan"], "cannot be nan"),
        (["learning_rate=1e-2..1e-4"], "the range 0.01..0.0001 of 'learning_rate' is empty"),
        (["learning_rate=1e-2.."], "'' is no value of 'learning_rate'"),
        (["r=9..15"], "'r' has no values"),
    ],
)
def test_wrong_spaces(texts, told):
    with pytest.raises(SearchInvalid) as error:
        Space.parse(texts)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_grid_needs_values():
    with pytest.raises(
        SearchInvalid, match=r"a grid needs values, and 'learning_rate' is the range 1e-05..0.01"
    ):
        sampler_named("grid", Space.parse(["learning_rate=1e-5..1e-2"]), None, 0, False, ())


def points(sampler, first=0):
    found = []
    while (settings := sampler.next(first + len(found))) is not None:
        found.append(settings)
    return found


def test_random_points_are_the_seed_s():
    values = Space.parse(["learning_rate=1e-4,3e-4", "r=8,16,32"])
    drawn = points(sampler_named("random", values, None, 1, False, ()))
    assert drawn != values.grid() and sorted(map(str, drawn)) == sorted(map(str, values.grid()))
    finished = [done(n, settings, 1.0) for n, settings in enumerate(drawn[:2])]
    assert points(sampler_named("random", values, 4, 1, False, finished), 2) == drawn[2:4]
    rates = Space.parse(["learning_rate=1e-5..1e-2", "r=8,16"])
    drawn = list(islice(rates.drawn(3), 40))
    assert drawn == list(islice(rates.drawn(3), 40)) != list(islice(rates.drawn(4), 40))
    logs = sorted(point["learning_rate"] for point in drawn)
    assert 1e-5 <= logs[0] < 1e-4 and 1e-3 < logs[-1] <= 1e-2 and {p["r"] for p in drawn} == {8, 16}


def run_tpe(sampler, score, count, first=0):
    """Trials at scores that a function gives."""
    found = []
    for number in range(first, first + count):
        settings = sampler.next(number)
        if settings is None:
            break
        found.append(done(number, settings, score(settings)))
        sampler.told(found[-1])
    return found


@pytest.mark.parametrize("maximize", [False, True])
def test_tpe_finds_the_good_end(maximize):
    pytest.importorskip("optuna")
    space = Space.parse(["learning_rate=1e-5..1e-1", "r=8,16"])
    sign = -1 if maximize else 1

    def score(settings):
        return sign * abs(settings["learning_rate"] / 1e-2 - 1)

    found = run_tpe(sampler_named("tpe", space, 30, 0, maximize, ()), score, 12)
    resumed = sampler_named("tpe", space, 30, 0, maximize, found)
    late = run_tpe(resumed, score, 18, first=12)
    assert len(late) == 18 and resumed.next(30) is None
    early = [abs(trial.score) for trial in found[:6]]
    assert sum(abs(trial.score) for trial in late[-6:]) < sum(early)
    assert len({str(trial.settings) for trial in found + late}) == 30


def test_tpe_tries_each_point_once_and_ends():
    pytest.importorskip("optuna")
    space = Space.parse(["r=4,8,16"])
    found = run_tpe(sampler_named("tpe", space, 20, 0, False, ()), lambda settings: settings["r"], 20)
    assert sorted(trial.settings["r"] for trial in found) == [4, 8, 16]


def test_tpe_prunes_what_is_above_the_median():
    """Failed and pruned trials of an earlier call are known, too."""
    pytest.importorskip("optuna")
    space = Space.parse(["learning_rate=1e-5..1e-1"])
    looks = ((33, 2.0), (67, 1.5))
    finished = [Trial(n, {"learning_rate": 10.0**-n}, "done", score=1.0, seen=looks) for n in (2, 3, 4)]
    finished.append(Trial(5, {"learning_rate": 0.05}, "failed", "the loss is nan"))
    finished.append(Trial(6, {"learning_rate": 0.04}, "pruned", "bad", loss=9.0, seen=((33, 9.0),)))
    sampler = sampler_named("tpe", space, 20, 0, False, finished)
    for number, loss, pruned in ((7, 2.1, True), (8, 1.9, False)):
        sampler.next(number)
        assert sampler.should_prune(number, 33, loss) is pruned
        status = "pruned" if pruned else "done"
        sampler.told(Trial(number, {"learning_rate": 1e-3}, status, score=None if pruned else 1.0))


def test_a_diverging_rate_is_pruned(tmp_path):
    pytest.importorskip("optuna")
    space = Space({"learning_rate": [5e-3, 1e-2, 1.5e-2, 2e-2, 20.0]})
    result = search(task(steps=6), space, tmp_path, sampler="tpe", trials=5)
    by_rate = {trial.settings["learning_rate"]: trial for trial in result.trials}
    bad = by_rate[20.0]
    assert bad.number >= 3, "else nothing is known to compare it with: take another seed"
    assert bad.status == "pruned" and bad.steps == 2 and "after 33 %" in bad.reason and bad.score is None
    assert len(result.trials) == 5 and result.best.settings["learning_rate"] in (1.5e-2, 2e-2)


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(PackageMissing, match=r"pip install 'pronghorn\[search\]'"):
        sampler_named("tpe", Space.parse(["r=8"]), None, 0, False, ())
    assert points(sampler_named("random", Space.parse(["r=8"]), None, 0, False, ())) == [{"r": 8}]


def test_pareto():
    trials = [
        done(0, {}, 1.0, seconds=10, memory=5),
        done(1, {}, 1.1, seconds=5, memory=5),
        done(2, {}, 1.1, seconds=6, memory=5),
        done(3, {}, 1.2, seconds=9, memory=1),
        done(4, {}, 1.0, seconds=10, memory=5),
        Trial(5, {}, "failed", "memory", seconds=0.1),
    ]
    assert pareto(trials, maximize=False) == {0, 1, 3, 4}
    assert pareto(trials, maximize=True) == {1, 3}
    assert [trial.number for trial in ranked(trials, False)] == [0, 4, 1, 2, 3, 5]
