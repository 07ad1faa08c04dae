"""The report of runs that are unusually long, short or broken, on a phone."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from pronghorn.pages.chart import Mark, Series, chart
from pronghorn.training.report.page import report_page
from pronghorn.tuning.curves import History, read_curves
from pronghorn.tuning.run_record import RunRecord, Setting
from tests.pages.browser import ask, needs_chromium


def record(steps: int, *, evaluated: bool = True, broken_from: float = math.inf, every: int = 1) -> RunRecord:
    """A run with a spike and, where it is evaluated, overfitting on two data sets."""
    at = np.arange(1, steps + 1)
    losses = (1.5 + 0.9 * (1 + 40 * at / steps) ** -0.5) * np.exp(
        0.05 * np.random.default_rng(0).standard_normal(steps)
    )
    losses[steps // 2] *= 4 if steps > 40 else 1
    losses[at >= broken_from] = math.nan
    log = [
        {"step": step, "loss": losses[step - 1], "grad_norm": 1.0, "learning_rate": 1e-4, "num_tokens": 10**7}
        for step in range(every, steps + 1, every)
    ]
    for step in range(steps // 10, steps + 1, max(steps // 10, 1)) if evaluated else ():
        value = math.nan if step >= broken_from else 1.7 + abs(step / steps - 0.4)
        log.append({"step": step, "eval_loss": value, "eval_a_data_set_of_a_long_name_loss": value})
    run = RunRecord(
        name="a-run", state="finished", max_steps=steps, steps=at.tolist(), step_losses=losses.tolist(),
        step_norms=losses.tolist(), log=log, memory=[(1, 2**34, 2**34)], memory_of="memory reserved on the GPU",
        planned_memory=2**34, settings=[Setting("output_dir", "/a/very/long/folder" * 6, "given")],
        data={name: {"rows": 51760, "tokens": 9123456, "supervised share": 0.4, "median length": 164,
                     "95 % up to": 402, "longest": 1024} for name in ("training", "evaluation")},
    )  # fmt: skip
    run.findings = [finding.as_dict() for finding in read_curves(History.of_record(run))]
    return run


RUNS = {
    "long": (record(2000, every=10), {"overfitting", "spike"}),
    "three steps": (record(3, evaluated=False), set()),
    "broken": (record(300, broken_from=170), {"not-a-number", "spike"}),
    "never a number": (record(40, broken_from=0), {"not-a-number"}),
}


@needs_chromium
@pytest.mark.parametrize("name,dark", [("long", False), ("three steps", True), ("never a number", False)])
def test_on_a_phone(tmp_path, name, dark):
    page = tmp_path / "report.html"
    page.write_text(report_page(RUNS[name][0]), encoding="utf-8")
    said = ask(page, tmp_path, width=360, dark=dark)
    assert said["width"] == 360 and said["needs"] <= 360, "nothing is wider than the screen"
    assert said["small"] == 0 and not said["errors"]
    assert "step" in said["readout"]


@pytest.mark.parametrize("name", RUNS)
def test_what_is_told(name):
    run, kinds = RUNS[name]
    assert {finding["kind"] for finding in run.findings} == kinds
    page = report_page(run)
    assert all(f">{kind}</span>" in page for kind in kinds)
    assert ("What the curves say" in page) == bool(kinds) and "nan" not in page
    assert (">NaN</b>" in page) == (name in ("broken", "never a number"))
    # One row a fact, so that it fits beside the name.
    assert "<tr><td>longest, tokens</td><td class=number>1,024</td><td class=number>1,024</td></tr>" in page


def test_labels_that_would_lie_upon_one_another_are_told_together():
    marks = [
        Mark(*ends, "warning", label)
        for ends, label in (
            ((40, 100), "2"),
            ((70, 70), "3"),
            ((10, 10), "1"),
            ((75, 75), "4"),
            ((90, 90), "5"),
        )
    ]
    figure = chart("Loss", [Series("loss", [(0, 1.0), (100, 2.0)])], marks=marks)
    labels = re.findall(r'class="told" style="left:([\d.]+)%">([^<]+)<', figure)
    assert labels == [("10.0", "1"), ("70.0", "2, 3, 4"), ("90.0", "5")]
