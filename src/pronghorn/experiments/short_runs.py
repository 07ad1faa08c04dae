"""Trainings of a series: the same settings again and again, of which nothing but a score is wanted."""

from __future__ import annotations

import copy
from typing import Any

from pronghorn.training import SFTConfig, SFTTrainer

#: What a run of a series does not need.
QUIET: dict[str, Any] = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "stop_early": False,
    "push_to_hub": False,
    "report": False,
    "report_to": [],
    "disable_tqdm": True,
    "eval_packing": False,
}


def short_trainer(
    model: Any,
    tokenizer: Any,
    rows: Any,
    held_out: Any,
    settings: SFTConfig,
    folder: str,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> SFTTrainer:
    """A trainer with these settings, but quiet; `options` are further arguments of SFTConfig that differ."""
    args = copy.copy(settings)
    for name, value in {**QUIET, "output_dir": folder, **options}.items():
        setattr(args, name, value)
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
