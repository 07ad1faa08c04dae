"""Two processes train on the same loss as one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.runs import chats, losses, trained, trainer


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.worker", str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    result = torch.load(tmp_path / "result.pt")
    assert result["processes"] == 2
    assert (tmp_path / "last_checkpoint" / "trainer_state.json").exists()

    one = trainer(
        tmp_path / "one",
        rows=chats(8),
        per_device_train_batch_size=8,
        assistant_only_loss=True,
        eval_dataset=chats(4),
    )
    one.train()
    assert result["loss"] == pytest.approx(losses(one)[0], rel=1e-5)
    assert result["num_tokens"] == one.state.log_history[0]["num_tokens"]
    assert result["eval_loss"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-4)
    for name, value in trained(one.model).items():
        torch.testing.assert_close(result["parameters"][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_stream_is_read_by_each_process(tmp_path):
    """Read by one for all, its batches would be joined and cut as if rows were all that they have."""
    run = trainer(tmp_path, eval_dataset=chats(4).to_iterable_dataset())
    assert run.accelerator.dispatch_batches is False
