"""Sides end to end on the CPU, each in its own process, and the tools around them."""

from __future__ import annotations

import json

import pytest

from benchmarks import kernels, run
from benchmarks.models import write_checkpoint


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """The tiny workload through the stock side and one of ours."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_checkpoint("tiny", folder / "tiny")
    csv = folder / "results.csv"
    sides = "hf-nockpt,pronghorn-none"
    arguments = [
        "--workload",
        "tiny",
        "--sides",
        sides,
        "--checkpoints",
        str(folder),
        "--logs",
        str(folder / "logs"),
    ]
    options = run.parse([*arguments, "--out", str(csv)])
    rows = run.run_workload(run.WORKLOADS["tiny"], [run.SIDES[n] for n in sides.split(",")], options, folder)
    return {row["side"]: row for row in rows}


def test_every_side_trains(results) -> None:
    assert {side: row.get("error") for side, row in results.items()} == dict.fromkeys(results)
    for row in results.values():
        assert row["steps"] == 2
        assert row["ms_per_step"] > 0
        assert row["first_step_s"] > row["loaded_s"] > 0
        assert row["trainable_parameters"] == results["hf-nockpt"]["trainable_parameters"]


def test_sides_do_the_same_work(results) -> None:
    """Same weights, same rows, B = 0 at the first step: the first losses agree to fp32 rounding."""
    stock = results["hf-nockpt"]
    for row in results.values():
        assert row["tokens_per_step"] == 64
        assert row["first_loss"] == pytest.approx(stock["first_loss"], rel=1e-4)
        assert row["mean_loss"] == pytest.approx(stock["mean_loss"], abs=0.02)
        assert row["parity"] == "same loss"


def test_rows_say_what_ran(results) -> None:
    assert "blocks" in results["pronghorn-none"]["kernels"]
    assert "2x none" in results["pronghorn-none"]["kernels"]
    assert results["hf-nockpt"]["versions"]["torch"]
    json.dumps(results)


def test_a_failing_side_is_one_line(tmp_path, capsys) -> None:
    write_checkpoint("tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "model-00001-of-00001.safetensors").write_bytes(b"broken")
    arguments = ["--workload", "tiny", "--sides", "pronghorn-all", "--checkpoints", str(tmp_path)]
    assert run.main(arguments) == 1
    assert "[PH" in capsys.readouterr().out


def test_the_budget_ends_a_run(tmp_path, capsys) -> None:
    write_checkpoint("tiny", tmp_path / "tiny")
    assert (
        run.main(["--workload", "tiny", "--sides", "hf", "--checkpoints", str(tmp_path), "--budget", "1"])
        == 1
    )
    assert "the time budget is spent" in capsys.readouterr().out


def test_kernel_table(capsys) -> None:
    assert kernels.main(["--shapes", "tiny", "--device", "cpu", "--repeats", "3"]) == 0
    out = capsys.readouterr().out
    for name in (
        "rms_norm backward",
        "qk_rope forward",
        "glu backward",
        "linear_cross_entropy",
        "dequantize_4bit",
    ):
        assert name in out
