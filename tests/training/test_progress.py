"""What a run shows and logs."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pronghorn.training.meter import Stopwatch
from pronghorn.training.progress import ProgressTable, peak_memory_gib
from tests.training.runs import chats, trainer


def test_piped_output_is_aligned_lines(tmp_path, capsys):
    run = trainer(
        tmp_path, disable_tqdm=False, max_steps=3, eval_dataset=chats(3), eval_strategy="steps", eval_steps=3
    )
    run.train()
    out = capsys.readouterr().out
    assert "\x1b" not in out and "{'" not in out
    lines = [line for line in out.splitlines() if line.strip()]
    assert lines[0].split() == ["step", "loss", "lr", "epoch", "tokens/s", "memory"]
    steps = [line for line in lines if re.match(r"\s+\d/3", line)]
    assert [line.split()[0] for line in steps] == ["1/3", "2/3", "3/3"]
    assert {len(line) for line in [lines[0], *steps]} == {len(lines[0])}
    assert re.search(r"^ +3  eval_loss \d\.\d{4}, eval accuracy \d+\.\d%$", out, re.M)


def test_disable_tqdm_shows_nothing(tmp_path, capsys):
    run = trainer(tmp_path, disable_tqdm=True)
    run.train()
    assert capsys.readouterr().out == ""
    kinds = {type(callback) for callback in run.callback_handler.callbacks}
    assert not kinds & {ProgressCallback, PrinterCallback, ProgressTable}


def test_a_terminal_gets_a_bar_that_goes_away(tmp_path):
    run = trainer(tmp_path, disable_tqdm=False, max_steps=2)
    screen = io.StringIO()
    table = next(c for c in run.callback_handler.callbacks if isinstance(c, ProgressTable))
    table.console = Console(file=screen, force_terminal=True, width=100)
    run.train()
    assert table.bar is None
    assert "training" in screen.getvalue() and "2/2" in screen.getvalue()


def test_the_bar_goes_away_after_an_error(tmp_path, monkeypatch):
    run = trainer(tmp_path, disable_tqdm=False)
    table = next(c for c in run.callback_handler.callbacks if isinstance(c, ProgressTable))
    table.console = Console(file=io.StringIO(), force_terminal=True)

    def fail(*args, **kwargs):
        assert table.bar is not None
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "compute_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert table.bar is None


def test_logs_carry_speed_memory_and_accuracy(tmp_path):
    run = trainer(tmp_path, max_steps=2, per_device_train_batch_size=3, pad_to_multiple_of=64)
    run.train()
    first, second = run.state.log_history[:2]
    assert first["tokens_per_second"] > 0 and 0 < first["peak_memory_gib"] < 64
    assert 0 <= first["mean_token_accuracy"] <= 1
    # Real tokens, without the padding to 64.
    rows = {len(row["input_ids"]) for row in run.train_dataset}
    assert first["num_tokens"] <= 3 * max(rows) and second["num_tokens"] > first["num_tokens"]
    total = sum(len(row["input_ids"]) for row in run.train_dataset)
    whole = trainer(tmp_path, max_steps=-1, num_train_epochs=1, pad_to_multiple_of=64)
    whole.train()
    assert whole.state.log_history[-2]["num_tokens"] == total


def test_stopwatch_leaves_out_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch()
    assert watch.lap() == 0.0
    watch = Stopwatch()
    watch.start()
    now[0] = 103.0
    watch.start()
    watch.skip(1.0)
    assert watch.lap() == 2.0
    now[0] = 104.5
    assert watch.lap() == 1.5


def test_peak_memory_is_plausible():
    assert 0.05 < peak_memory_gib() < 256
