"""Values of training arguments that Transformers and TRL take without a word, or refuse when a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from pronghorn.errors import PackageMissing, UnknownArgument, nearest

#: argument -> its choices; another one would be the default without a word
CHOICES: Mapping[str, tuple[str, ...]] = {
    "loss_type": ("nll", "dft"),
    "packing_strategy": ("bfd", "bfd_split", "bfd-requeue", "ffd", "wrapped"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "truncation_mode": ("keep_start", "keep_end"),
}
_SEED = (0, 2**32 - 1)
_ANY = math.inf
#: argument -> (least, most); None is no value of its own
RANGES: Mapping[str, tuple[float, float]] = {
    "adam_beta1": (0.0, math.nextafter(1.0, 0.0)),
    "adam_beta2": (0.0, math.nextafter(1.0, 0.0)),
    "adam_epsilon": (0.0, _ANY),
    "data_seed": _SEED,
    "dataloader_num_workers": (0, _ANY),
    "label_smoothing_factor": (0.0, 1.0),
    "learning_rate": (0.0, 100.0),  # beyond, a sign of the exponent is missing: 2e4 for 2e-4
    "neftune_noise_alpha": (0.0, _ANY),
    "report_samples": (0, _ANY),
    "seed": _SEED,
    "weight_decay": (0.0, _ANY),
}


def check_values(args: Any) -> None:
    """
    Raises:
        UnknownArgument: a value outside its choices or range.
    """
    for name, choices in CHOICES.items():
        value = getattr(args, name, None)
        if value is not None and value not in choices:
            raise UnknownArgument(
                f"{name}={value!r} does not exist",
                fix=nearest(str(value), choices) or f"use one of {', '.join(choices)}",
            )
    for name, (least, most) in RANGES.items():
        value = getattr(args, name, None)
        if isinstance(value, int | float) and not least <= value <= most:
            raise UnknownArgument(
                f"{name}={value!r} is outside of its range", fix=f"use {_range(least, most)}"
            )


def _range(least: float, most: float) -> str:
    if most == _ANY:
        return f"{least:g} or more"
    return f"{least:g} or more, below 1" if 0.9 < most < 1 else f"{least:g} to {most:.0f}"


def check_together(args: Any) -> None:
    """What an argument asks of others, after Transformers has settled them.

    Raises:
        UnknownArgument: without what it asks for.
    """
    evaluated = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
        if not evaluated:
            raise UnknownArgument("save_strategy='best' needs evaluations", fix="set eval_strategy")
        if args.metric_for_best_model is None:
            raise UnknownArgument(
                "save_strategy='best' needs metric_for_best_model",
                fix="set it, to 'loss' for the evaluation loss",
            )
    _check_schedule(args)


def _check_schedule(args: Any) -> None:
    """The schedule, made once for nothing: it asks for arguments of its own."""
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if kind not in [item.value for item in SchedulerType] or kind in ("reduce_lr_on_plateau", "greedy"):
        return
    given = args.lr_scheduler_kwargs
    idle = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate or 1.0)
    try:
        get_scheduler(kind, idle, 1, 10, scheduler_specific_kwargs=dict(given or {}))
    except (TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UnknownArgument(
            f"lr_scheduler_type='{kind}' cannot be made with lr_scheduler_kwargs={given}: {text}",
            fix="give what it asks for, such as {min_lr_rate: 0.1} or {num_decay_steps: 100}",
        ) from error


def check_packages(args: Any) -> None:
    """
    Raises:
        PackageMissing: an argument asks for a package that is not installed.
    """
    if args.use_liger_kernel:
        from transformers.utils import is_liger_kernel_available

        if not is_liger_kernel_available():
            raise PackageMissing(
                "use_liger_kernel=True needs the package liger-kernel, which is not installed",
                fix="leave it out: the fast path has kernels of its own",
            )
