"""TRL's trainers for preferences and rewards, as scripts call them: TRL's own classes, under older arguments too.

What they train is the model that they are given, so a bound one takes the fast path in them. A class is made when a
script asks for it, since finding TRL's takes seconds; `from pronghorn.compat.preference import DPOTrainer` does so.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import warnings
from importlib import import_module
from typing import Any

import torch
import transformers
from trl.import_utils import is_vllm_available

from pronghorn.compat.answers import SamplingParams
from pronghorn.compat.arguments import TrainingArguments, as_current
from pronghorn.training.setup import use_one_gpu

logger = logging.getLogger("pronghorn")

#: Where TRL has these trainers and their configurations now; older scripts import all of them from its top.
_HOMES = {
    "CPO": "trl.experimental.cpo",
    "DPO": "trl",
    "GRPO": "trl",
    "KTO": "trl",
    "ORPO": "trl.experimental.orpo",
    "Reward": "trl",
}
_NAMES = {f"{method}{kind}" for method in _HOMES for kind in ("Config", "Trainer")}
#: Arguments of older versions that cut prompts, made files or chose a padding, for versions that do without them.
_GONE = {
    "generate_during_eval", "is_encoder_decoder", "label_pad_token_id", "max_completion_length", "max_prompt_length",
    "max_target_length", "padding_value", "unsloth_num_chunks", "vllm_device",
    "vllm_dtype", "vllm_max_model_len",
}  # fmt: skip
#: What of a `SamplingParams` a configuration has a field for.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    trains = name.endswith("Trainer")
    with warnings.catch_warnings():  # of TRL's, that what is in trl.experimental may change
        warnings.simplefilter("ignore")
        base = getattr(import_module(_HOMES[name.removesuffix("Trainer" if trains else "Config")]), name)
    made = _trainer(base) if trains else _configuration(base)
    globals()[name] = made  # pickles of arguments, which checkpoints hold, find it here
    return made


def _configuration(base: type) -> type:
    """A configuration class that takes older names; without a GPU it asks for none of its formats."""

    def __init__(self: Any, *args: Any, **given: Any) -> None:
        known = {item.name for item in dataclasses.fields(base)}
        if "vllm_sampling_params" not in known:
            given = {**_sampling(given.pop("vllm_sampling_params", None), known), **given}
        current = _whole_groups(as_current(_without_gone(given, known), base, tell=True))
        if current.get("use_vllm") and not is_vllm_available():
            current["use_vllm"] = False
            logger.warning("pronghorn: use_vllm=True has no effect: answers come from Transformers' generate")
        if not torch.cuda.is_available():
            current |= {"bf16": False, "fp16": False}
        base.__init__(self, *args, **current)  # type: ignore[misc]

    return type(
        base.__name__, (base,), {"__init__": __init__, "__module__": __name__, "__doc__": base.__doc__}
    )


def _whole_groups(given: dict[str, Any]) -> dict[str, Any]:
    """Batches that hold all answers to a prompt, where a script counts prompts."""
    group = given.get("num_generations")
    if not group or given.get("steps_per_generation") or given.get("generation_batch_size"):
        return given
    rows = given.get("per_device_train_batch_size", 8)
    if rows * given.get("gradient_accumulation_steps", 1) % group == 0:
        return given
    logger.warning(
        "pronghorn: per_device_train_batch_size=%d counts answers, and %d belong to a prompt: it is %d now",
        rows, group, group,
    )  # fmt: skip
    return {**given, "per_device_train_batch_size": group}


def _sampling(sampling: Any, known: set[str]) -> dict[str, Any]:
    """What a script's `vllm_sampling_params` changes of how answers are drawn, for the configuration's own fields."""
    changed = {}
    for name in _SAMPLING:
        value, usual = getattr(sampling, name, None), getattr(SamplingParams, name)
        if name in known and value is not None and value != usual:
            changed[name] = max(value, 0) if name == "top_k" else value
    return changed


def _trainer(base: type) -> type:
    """A trainer class that takes `tokenizer=`, and arguments that belong to its configuration now."""

    def __init__(self: Any, *args: Any, tokenizer: Any = None, **given: Any) -> None:
        signature = inspect.signature(base)
        own = signature.parameters
        given = {**signature.bind_partial(*args).arguments, **given}
        settings = given["args"] = _settings(base, given.get("args"))
        if tokenizer is not None:
            given.setdefault("processing_class", tokenizer)
        for name in [name for name in given if name not in own and hasattr(settings, name)]:
            setattr(settings, name, given.pop(name))
            logger.warning("pronghorn: %s= belongs to %s now", name, type(settings).__name__)
        model: Any = given.get("model")
        use_one_gpu(settings, model)
        if "ref" in getattr(model, "peft_config", {}) and model.active_adapter != "ref":
            # An earlier trainer's copy of where it began, as when a cell is run again.
            model.delete_adapter("ref")
        base.__init__(self, **_without_gone(given, own))  # type: ignore[misc]

    return type(
        base.__name__, (base,), {"__init__": __init__, "__module__": __name__, "__doc__": base.__doc__}
    )


def _settings(base: type, given: Any) -> Any:
    """The configuration that a trainer has today, out of what older scripts give it: plain arguments, or none."""
    kind = getattr(import_module(__name__), base.__name__.replace("Trainer", "Config"))
    if given is None:
        return kind("trainer_output")
    if type(given) not in (transformers.TrainingArguments, TrainingArguments):
        return given
    known = {item.name for item in dataclasses.fields(kind) if item.init}
    values = {name: value for name, value in given.to_dict().items() if name in known}
    # to_dict writes secrets as "<HUB_TOKEN>".
    values |= {name: getattr(given, name) for name in values if name.endswith("_token")}
    return kind(**values)


def _without_gone(given: dict[str, Any], known: Any) -> dict[str, Any]:
    """What is given less the arguments that this version does without, which is said."""
    gone = sorted(name for name in given if name in _GONE and name not in known)
    for name in gone:
        logger.warning("pronghorn: %s= has no effect any more", name)
    return {name: value for name, value in given.items() if name not in gone}
