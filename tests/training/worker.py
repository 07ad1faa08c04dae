"""One process of a distributed run: an SGD step over eight rows. `python -m tests.training.worker FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.training.runs import chats, losses, trained, trainer


def main(folder: Path) -> None:
    run = trainer(
        folder, rows=chats(8), per_device_train_batch_size=2, gradient_accumulation_steps=2, ddp_backend="gloo",
        assistant_only_loss=True, eval_dataset=chats(4), per_device_eval_batch_size=1, save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    run.train()
    evaluation = run.evaluate()["eval_loss"]
    if run.is_world_process_zero():
        logged = run.state.log_history[0]
        torch.save(
            {
                "processes": run.accelerator.num_processes, "loss": losses(run)[0], "eval_loss": evaluation,
                "num_tokens": logged["num_tokens"], "parameters": trained(run.model),
            },
            folder / "result.pt",
        )  # fmt: skip
    # Left to the interpreter's end, a thread of the group may still run when its owner is destroyed, which aborts the
    # process ("terminate called without an active exception").
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
