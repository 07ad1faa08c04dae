"""Runs side by side: what differs is listed, what is better is marked, and runs of other trainers take part."""

from __future__ import annotations

import dataclasses

import pytest

from pronghorn.experiments.compare_runs import compare, comparison_page
from pronghorn.pages import write_whole
from pronghorn.tuning.run_record import RunRecord, Setting
from tests.pages.browser import ask, needs_chromium
from tests.pages.test_pages import EVIL


def run(name: str, rate: float, loss: float, *, batch: int = 4, best_at: int = 60) -> RunRecord:
    log: list[dict] = []
    for step in range(10, 101, 10):
        log.append(
            {"step": step, "loss": loss + 1 / step, "learning_rate": rate, "num_tokens": 100 * batch * step,
             "tokens_per_second": 1000.0 * batch, "grad_norm": 1.0}
        )  # fmt: skip
        if step % 20 == 0:
            log.append({"step": step, "eval_loss": loss + 0.1 + abs(step - best_at) / 400})
    return RunRecord(
        name=name, state="finished", seconds=60.0 * batch, max_steps=100, log=log,
        settings=[
            Setting("learning_rate", rate, "given"), Setting("per_device_train_batch_size", batch, "given"),
            Setting("output_dir", name, "given"), Setting("weight_decay", 0.0, "default"),
        ],
        steps=list(range(1, 101)), step_losses=[loss + 1 / step for step in range(1, 101)], step_norms=[1.0] * 100,
        memory=[(10, 2**30, 2**30 * batch)], environment={"torch": "2.13", "device": "H200"},
        model={"name": "m", "engine": name}, data={"training": {"rows": 100}},
    )  # fmt: skip


def figures(comparison):
    return {figure.name: figure for figure in comparison.figures}


def test_what_differs_and_what_is_better():
    comparison = compare([run("a", 1e-4, 1.5), run("b", 2e-4, 1.4, batch=8, best_at=40)], ["x", "y"])
    assert comparison.names == ("a", "b")
    assert comparison.settings == (
        ("learning_rate", ("0.0001", "0.0002")),
        ("per_device_train_batch_size", ("4", "8")),
    )
    found = figures(comparison)
    assert found["evaluation loss, best"].values == (pytest.approx(1.6), pytest.approx(1.5))
    assert found["evaluation loss, best"].winner() == 1 and found["  at step"].values == (60, 40)
    assert found["tokens per second, median"].texts() == ["4,000", "8,000"]
    assert found["memory, most, GiB"].winner() == 0 and found["time"].texts() == ["4 min 00 s", "8 min 00 s"]
    assert found["steps"].values == (100, 100) and found["steps"].winner() is None
    # The median of the last five steps, not the luck of the last one.
    assert found["training loss, end"].values[0] == pytest.approx(1.5 + 1 / 98)
    assert comparison.findings[1][0].startswith("overfitting: The evaluation loss rose from 1.5 at step 40")


def test_figures_that_look_alike_have_no_winner():
    comparison = compare([run("a", 1e-4, 1.5), run("b", 1e-4, 1.5 + 1e-7)], ["a", "b"])
    assert figures(comparison)["training loss, end"].winner() is None and comparison.settings == ()


def test_runs_of_one_name_are_told_apart_by_their_places():
    comparison = compare([run("out", 1e-4, 1.5), run("out", 1e-4, 1.5)], ["one/out", "two/out"])
    assert comparison.names == ("one/out", "two/out")


def test_a_run_that_knows_less_takes_part():
    bare = RunRecord(name="other", log=run("b", 1e-4, 1.3).log)
    comparison = compare([run("a", 1e-4, 1.5), bare], ["a", "b"])
    found = figures(comparison)
    assert comparison.settings == () and found["time"].texts() == ["4 min 00 s", "-"]
    assert found["training loss, end"].winner() == 1
    empty = compare([bare, RunRecord(name="empty")], ["a", "b"])
    assert figures(empty)["steps"].texts() == ["100", "-"] and "<figure" in comparison_page(empty)


def test_the_page():
    page = comparison_page(compare([run("a", 1e-4, 1.5), run("b", 2e-4, 1.4, batch=8)], ["a", "b"]))
    for title in (
        "Training loss, medians",
        "over tokens",
        "Evaluation loss",
        "Gradient norm",
        "Most memory so far",
    ):
        assert title in page
    alike = comparison_page(compare([run("a", 1e-4, 1.5), run("b", 2e-4, 1.4)], ["a", "b"]))
    assert "over tokens" not in alike


@needs_chromium
@pytest.mark.parametrize("width,dark", [(1200, True), (360, False)])
def test_the_page_in_a_browser(tmp_path, width, dark):
    evil = dataclasses.replace(run(EVIL, 2e-4, 1.4), environment={EVIL: EVIL})
    page = comparison_page(compare([run("a", 1e-4, 1.5), evil, run("c", 1e-5, 1.9)], [EVIL, "b", "c"]))
    assert page.count("<script") == 1 and "<img" not in page and "\u202e" not in page
    write_whole(page, tmp_path / "compare.html")
    said = ask(tmp_path / "compare.html", tmp_path, width=width, dark=dark, at=1.0)
    assert said["needs"] <= width and not said["ran"] and said["images"] == said["links"] == 0
    assert said["readout"].startswith("step 100") and "a 1.51" in said["readout"]
