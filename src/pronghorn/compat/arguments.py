"""Training arguments as scripts write them: names of older Transformers and TRL versions, and Unsloth's own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

from pronghorn import training

logger = logging.getLogger("pronghorn")

#: Older name -> today's, with the same meaning.
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "use_liger": "use_liger_kernel",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of all steps
}
#: Older switch -> (today's name, value) when it is on.
_SWITCHES = {
    "adafactor": ("optim", "adafactor"),
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
}
#: Older names without a meaning today.
_GONE = {
    "chars_per_token", "dataset_batch_size", "fp16_backend", "fp16_opt_level", "half_precision_backend",
    "include_inputs_for_metrics", "include_tokens_per_second", "jit_mode_eval", "logging_dir", "mp_parameters",
    "num_of_sequences", "overwrite_output_dir", "past_index", "push_to_hub_organization", "ray_scope",
    "save_safetensors", "torchdynamo", "tpu_metrics_debug", "tpu_num_cores", "use_ipex",
    "use_legacy_prediction_loop", "use_mps_device",
}  # fmt: skip


def as_current(given: Mapping[str, Any], kind: type, *, tell: bool = False) -> dict[str, Any]:
    """Arguments under the names that `kind`, a dataclass of arguments, has today; unknown ones stay for it to refuse.

    Args:
        tell: say once per name what became of it.
    """
    known = {item.name for item in dataclasses.fields(kind)}
    now = {name: value for name, value in given.items() if name in known}
    notes = []
    for name, value in given.items():
        if name in known:
            continue
        if name in _RENAMED:
            # warmup_ratio=0.1 beside warmup_steps=5 always meant five steps, and beside warmup_steps=0 a tenth.
            if value is not None and not now.get(_RENAMED[name]):
                now[_RENAMED[name]] = value
            notes.append(f"{name}= is called {_RENAMED[name]}= now")
        elif name in _SWITCHES:
            target, chosen = _SWITCHES[name]
            if value:
                now[target] = chosen
            notes.append(f"{name}=True is {target}='{chosen}' now")
        elif name == "use_reentrant":
            _set_reentrant(now, known, value)
        elif name in _GONE:
            notes.append(f"{name}= has no effect any more")
        else:
            now[name] = value
    for note in notes if tell else ():
        logger.warning("pronghorn: %s", note)
    return now


def _set_reentrant(arguments: dict[str, Any], known: set[str], value: Any) -> None:
    """Into the dictionary that Transformers keeps it in, under the name that was given, or this version's.

    It matters for models on their stock forward; the fast path's backward keeps no part of autograd's.
    """
    names = [n for n in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs") if n in known]
    name = next((n for n in names if arguments.get(n) is not None), names[-1])
    if value is not None:
        arguments[name] = {**(arguments.get(name) or {}), "use_reentrant": value}


class TrainingArguments(transformers.TrainingArguments):
    """Transformers' own, under older names too, and with `use_reentrant` of `gradient_checkpointing_kwargs`."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **as_current(given, type(self), tell=True))


class SFTConfig(training.SFTConfig):
    """`pronghorn.SFTConfig`, under older names too."""

    def __new__(cls, *args: Any, **given: Any) -> SFTConfig:
        return super().__new__(cls, *args, **as_current(given, cls))  # type: ignore[return-value]

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **as_current(given, type(self), tell=True))


@dataclass(init=False)
class UnslothTrainingArguments(SFTConfig):
    """`SFTConfig` with a learning rate of their own for embed_tokens and lm_head, where they are trained."""

    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of embed_tokens and lm_head; None: learning_rate."}
    )

    def __init__(self, embedding_learning_rate: float | None = None, *args: Any, **given: Any) -> None:
        self.embedding_learning_rate = embedding_learning_rate
        super().__init__(*args, **given)
