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
    options = run.parse([*arguments, "--out", str(csv), "--parity", str(folder / "parity.json")])
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
        assert row["supervised_per_s"] == pytest.approx(row["tokens_per_s"] * 62 / 64)
        assert row["first_loss"] == pytest.approx(stock["first_loss"], rel=1e-4)
        assert row["mean_loss"] == pytest.approx(stock["mean_loss"], abs=0.02)
    assert stock["parity"] == "same loss"
    assert results["pronghorn-none"]["parity"] == "parity not run"


def test_rows_say_what_ran(results) -> None:
    assert "blocks" in results["pronghorn-none"]["kernels"]
    assert "2x none" in results["pronghorn-none"]["kernels"]
    assert results["pronghorn-none"]["attention"] == "cpu"
    assert results["pronghorn-none"]["steps_run"].startswith("eager")
    assert results["hf-nockpt"]["attention"] == "sdpa"
    assert results["hf-nockpt"]["versions"]["torch"]
    json.dumps(results)


def test_sides_in_turn_with_prompts_and_accumulation(tmp_path, capsys) -> None:
    """Both sides wait for one another; four rows a step, of which only the responses are supervised."""
    write_checkpoint("tiny", tmp_path / "tiny")
    arguments = [
        "--workload",
        "tiny-alpaca",
        "--sides",
        "hf-nockpt,pronghorn-all",
        "--checkpoints",
        str(tmp_path),
    ]
    options = run.parse([*arguments, "--in-turn", "--parity", str(tmp_path / "parity.json")])
    sides = [run.SIDES[name] for name in ("hf-nockpt", "pronghorn-all")]
    rows = run.run_workload(run.WORKLOADS["tiny-alpaca"], sides, options, tmp_path)
    assert [row.get("error") for row in rows] == [None, None]
    assert rows[0]["tokens_per_step"] == rows[1]["tokens_per_step"] > 0
    assert 0.3 < rows[1]["supervised_per_s"] / rows[1]["tokens_per_s"] < 0.9
    assert rows[1]["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-3)
    assert rows[1]["first_step_s"] > rows[1]["loaded_s"]


def test_a_side_that_fails_in_turn_stops_nobody(tmp_path) -> None:
    """The second side asks for an attention that a CPU has not."""
    write_checkpoint("tiny", tmp_path / "tiny")
    arguments = ["--workload", "tiny", "--sides", "x", "--checkpoints", str(tmp_path), "--in-turn"]
    options = run.parse([*arguments, "--parity", str(tmp_path / "parity.json")])
    sides = [run.SIDES["hf-nockpt"], run.find_side("pronghorn-cudnn")]
    rows = run.run_workload(run.WORKLOADS["tiny"], sides, options, tmp_path)
    assert "error" not in rows[0]
    assert "[PH" in rows[1]["error"]


def test_a_failing_side_is_one_line(tmp_path, capsys) -> None:
    write_checkpoint("tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "model-00001.safetensors").write_bytes(b"broken")
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
