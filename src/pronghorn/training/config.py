"""`SFTConfig`: TRL's, with defaults that leave to the model what the model already decides."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
import trl
from transformers.integrations import integration_utils

from pronghorn.errors import PackageMissing, UnknownArgument, nearest
from pronghorn.memory import parse_budget
from pronghorn.training.limits import check_packages, check_together, check_values

logger = logging.getLogger("pronghorn")

#: Default of `max_length`: the model's `max_seq_length`, or this where a model has none.
AUTO = "auto"
DEFAULT_MAX_LENGTH = 1024


@dataclass
class SFTConfig(trl.SFTConfig):
    """TRL's SFTConfig. What differs:

    - `gradient_checkpointing` is off by default: the save levels chosen in `get_peft_model` stay as they are, and where
      none were chosen they are planned for the largest batch and the memory that is free. True makes every layer of a
      bound model keep nothing but its input; False makes one that comes unbound keep everything.
    - `bf16`/`fp16` are off by default: the model computes in its own dtype. True adds mixed precision for a float32
      model, as ever.
    - `max_length="auto"` is the model's `max_seq_length`, or 1024 without one. `max_seq_length` is its older name.
    - `logging_nan_inf_filter` is off: a loss that is no number shows, with a warning.
    - `output_dir` is "outputs".
    - `cuda_graphs` (on) launches a micro-batch, forward and backward, as one CUDA graph where the GPU and the model
      allow it; batches are padded up to a few sizes with tokens nobody learns from.
    - `memory_budget` ("17.5GiB", bytes, or "auto" for all that is free) plans within that memory, also where save
      levels were chosen before.
    - `drop_unsupervised_rows` leaves out rows without a token to train on, instead of refusing them.
    - `stop_early` ends a run that has nothing more to gain: its evaluation loss has turned, its loss has diverged or is
      no number. With evaluations, the best of them is saved, and its weights are loaded at the end
      (`load_best_model_at_end` and `save_strategy="best"`, unless either was given).
    - `report` (on) leaves `report.html` and `run.json` in `output_dir`, with answers to `report_samples` prompts of the
      evaluation data before and after training.
    """

    # Names, types and the metadata of --help are TRL's; only defaults change.
    output_dir: str | None = field(
        default="outputs",
        metadata={"help": "Where checkpoints go; `last_checkpoint` in it leads to the newest."},
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Keep only layer inputs for backward and compute the rest again."}
    )
    max_length: int | str | None = field(
        default=AUTO,
        metadata={
            "help": "Rows are cut to this many tokens, and packed into rows of it. 'auto': the model's."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace a loss that is no number by the average in logs."}
    )
    drop_unsupervised_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows without a token to train on instead of refusing them."},
    )
    cuda_graphs: bool = field(
        default=True, metadata={"help": "Launch each micro-batch as one CUDA graph where possible."}
    )
    memory_budget: str | int | None = field(
        default=None,
        metadata={"help": "GPU memory a step may take, such as 17.5GiB, or 'auto': layers keep what fits."},
    )
    stop_early: bool = field(
        default=False,
        metadata={
            "help": "End a run whose evaluation loss turns or whose loss diverges; keep the best weights."
        },
    )
    report: bool = field(default=True, metadata={"help": "Leave report.html and run.json in output_dir."})
    report_samples: int = field(
        default=3,
        metadata={
            "help": "Prompts of the evaluation data answered before and after training for the report."
        },
    )
    max_seq_length: int | None = field(default=None, metadata={"help": "Older name of max_length."})
    #: names of the arguments that somebody gave; the others are defaults
    given: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    def __new__(cls, *args: Any, **kwargs: Any) -> SFTConfig:
        """Refuses unknown names with the nearest known one, before Python's own TypeError would."""
        known = {item.name: item for item in dataclasses.fields(cls) if item.init}
        for name in kwargs:
            if name not in known:
                hint = nearest(name, known)
                raise TypeError(f"SFTConfig has no argument '{name}'" + (f": {hint}" if hint else ""))
        config = super().__new__(cls)
        config.given = frozenset(kwargs)
        if config.given == known.keys():  # a parser gives every name, and dataclasses.replace does
            config.given = frozenset(
                name for name, value in kwargs.items() if not _is_default(value, known[name])
            )
        return config

    @classmethod
    def recommended(cls, model: Any, dataset: Any, processing_class: Any = None, **given: Any) -> SFTConfig:
        """The configuration that the rules of docs/tuning.md advise for this model and these rows.

        Args:
            processing_class: the tokenizer, to count tokens; without one four characters are taken for one.
            given: arguments that are taken as they are, and that the others follow.
        """
        from pronghorn.tuning.recommend import recommended_arguments

        return cls(**recommended_arguments(model, dataset, processing_class, given), **given)

    def __post_init__(self) -> None:
        # Transformers turns None into False, which is another answer.
        asked = getattr(self, "activation_checkpointing", None)
        self.checkpointing_refused = self.gradient_checkpointing is False and not asked
        if self.max_seq_length is not None:
            logger.warning(
                "pronghorn: max_seq_length is called max_length now; %d is used", self.max_seq_length
            )
            self.max_length, self.max_seq_length = self.max_seq_length, None
        if isinstance(self.max_length, str) and self.max_length.isdecimal():
            self.max_length = int(self.max_length)  # from a command line
        _check_length(self.max_length)
        check_budget(self.memory_budget)
        settle_device(self)
        if self.stop_early:
            self._keep_the_best()
        super().__post_init__()
        check_values(self)
        check_together(self)
        check_packages(self)
        _check_reports(self.report_to)

    def _keep_the_best(self) -> None:
        """Save and load the weights of the best evaluation, as far as nothing else was asked for."""
        evaluated = str(getattr(self.eval_strategy, "value", self.eval_strategy))
        if evaluated == "no" or "load_best_model_at_end" in self.given:
            return
        if "save_strategy" not in self.given:
            self.save_strategy = "best"
        saved = str(getattr(self.save_strategy, "value", self.save_strategy))
        together = saved == evaluated and (saved != "steps" or self.save_steps == self.eval_steps)
        self.load_best_model_at_end = saved == "best" or together
        if not self.load_best_model_at_end:
            logger.warning(
                "pronghorn: stop_early: with save_strategy='%s' the best weights may not be saved, and are not loaded "
                "at the end; save_strategy='best' does both", saved,
            )  # fmt: skip


def settle_device(args: Any) -> None:
    """Before Transformers looks at its arguments: mixed precision only where it was asked for, and no GPU that is not
    there."""
    args.bf16, args.fp16 = bool(args.bf16), bool(args.fp16)
    if not torch.accelerator.is_available():
        # Transformers wants to be told; float16 training needs a GPU's loss scaling.
        args.use_cpu, args.dataloader_pin_memory = True, False
        if args.fp16:
            args.fp16 = False
            logger.warning("pronghorn: fp16=True has no effect without a GPU: the model's own dtype is used")
        if getattr(args, "activation_offloading", False):
            args.activation_offloading = False
            logger.warning("pronghorn: activation_offloading=True has no effect without a GPU")


def check_budget(budget: Any) -> None:
    """Refuse what is no memory size, also where there is no GPU to use it on.

    Raises:
        BudgetInvalid: for anything but a size, "auto" or None.
    """
    if budget is not None:
        parse_budget(budget, free=0)


def _check_length(length: Any) -> None:
    """Refuse what cuts rows at no place, or from behind.

    Raises:
        UnknownArgument: for anything but a positive whole number, "auto" or None.
    """
    if length not in (None, AUTO) and (not isinstance(length, int) or length < 1):
        raise UnknownArgument(
            f"max_length={length!r} is no number of tokens", fix='use a positive whole number, "auto" or None'
        )


def _check_reports(names: Sequence[str]) -> None:
    """Refuse what Transformers would refuse only when the model is loaded and the rows are prepared.

    Raises:
        UnknownArgument: a name that it has no callback for.
        PackageMissing: the callback's package is not installed.
    """
    for name in names:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
            raise UnknownArgument(
                f"report_to cannot be '{name}'", fix=nearest(name, known) or f"use one of {', '.join(known)}"
            )
        installed = getattr(integration_utils, f"is_{name}_available", None)
        if installed is not None and not installed():
            raise PackageMissing(
                f"report_to='{name}' needs the package {name}, which is not installed or switched off",
                fix=f"pip install {name}, or leave report_to out: report.html is written anyway",
            )


def as_sft_config(args: Any) -> SFTConfig:
    """`args` of any trainer as our SFTConfig, with every value kept that its owner set.

    TrainingArguments and TRL's SFTConfig are converted. TRL turns gradient checkpointing on by itself, which says
    nothing about what the user wants; of its configuration that flag is not taken over.
    """
    if args is None:
        return SFTConfig()
    if isinstance(args, SFTConfig):
        return args
    if not isinstance(args, transformers.TrainingArguments):
        raise TypeError(f"args must be an SFTConfig or TrainingArguments, not {type(args).__name__}")
    known = {item.name for item in dataclasses.fields(SFTConfig) if item.init}
    values = {name: value for name, value in args.to_dict().items() if name in known}
    # to_dict writes secrets as "<HUB_TOKEN>".
    values |= {name: getattr(args, name) for name in values if name.endswith("_token")}
    if isinstance(args, trl.SFTConfig) and values.pop("gradient_checkpointing", False):
        for name in (
            "activation_checkpointing",
            "gradient_checkpointing_kwargs",
            "activation_checkpointing_kwargs",
        ):
            values.pop(name, None)
        logger.warning(
            "pronghorn: gradient_checkpointing=True is a default of trl.SFTConfig and was not taken over; "
            "pronghorn.SFTConfig(gradient_checkpointing=True) asks for it"
        )
    if not isinstance(args, trl.SFTConfig):
        logger.warning("pronghorn: TrainingArguments are converted to SFTConfig; every value is kept")
    config = SFTConfig(**values)
    config.given = frozenset(
        item.name
        for item in dataclasses.fields(args)
        if item.name in values and not _is_default(getattr(args, item.name), item)
    )
    return config


def _is_default(value: Any, item: dataclasses.Field) -> bool:
    if item.default_factory is not dataclasses.MISSING:
        return bool(value == item.default_factory())
    return bool(value == item.default)
