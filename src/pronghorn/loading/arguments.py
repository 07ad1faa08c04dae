"""Arguments of older scripts: what is accepted without effect, and what is refused."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pronghorn.errors import UnknownArgument, nearest

logger = logging.getLogger("pronghorn")

#: Unsloth's arguments of `from_pretrained` that have nothing to switch here.
NO_EFFECT_ON_LOADING = frozenset(
    {
        "disable_log_stats",
        "enforce_eager",
        "fast_inference",
        "float32_mixed_precision",
        "float8_kv_cache",
        "fullgraph",
        "gpu_memory_utilization",
        "load_in_16bit",
        "max_lora_rank",
        "offload_embedding",
        "qat_scheme",
        "random_state",
        "resize_model_vocab",
        "return_logits",
        "unsloth_force_compile",
        "unsloth_tiled_mlp",
        "unsloth_vllm_standby",
        "use_exact_model_name",
    }
)

#: Unsloth's arguments of `get_peft_model` that have nothing to switch here.
NO_EFFECT_ON_ADAPTERS = frozenset({"finetune_audio_layers", "temporary_location"})


def note_without_effect(given: Mapping[str, Any], function: str) -> None:
    """One line for all arguments that were accepted and change nothing."""
    if given:
        logger.info("pronghorn: %s: %s changes nothing here", function, ", ".join(sorted(given)))


def refuse_unknown(given: Iterable[str], function: Callable[..., Any], more: Iterable[str] = ()) -> None:
    """Refuse arguments that `function` does not have.

    Raises:
        UnknownArgument: naming the nearest known one.
    """
    known = {*inspect.signature(function).parameters, *more} - {"kwargs"}
    for name in sorted(set(given) - known):
        raise UnknownArgument(
            f"{function.__name__}() has no argument '{name}'",
            fix=nearest(name, known) or f"its arguments are {', '.join(sorted(known))}",
        )


def refuse_other_than(value: Any, choices: Iterable[Any], argument: str) -> None:
    """Refuse a value outside an argument's choices.

    Raises:
        UnknownArgument: naming the choices.
    """
    choices = list(choices)
    if value not in choices:
        guess = nearest(str(value), [str(choice) for choice in choices])
        shown = ", ".join(repr(choice) for choice in choices)
        raise UnknownArgument(
            f"{argument}={value!r} does not exist", fix=f"use one of {shown}; {guess}".rstrip("; ")
        )


def refuse_pair(model: Any) -> None:
    """Refuse what `from_pretrained` returns, where a model is expected.

    Raises:
        UnknownArgument: for a tuple.
    """
    if isinstance(model, tuple):
        raise UnknownArgument(
            "from_pretrained() gives two things, and both are here where the model is expected",
            fix="take them apart: model, tokenizer = FastLanguageModel.from_pretrained(...)",
        )


def refuse_no_length(value: Any, argument: str) -> None:
    """Refuse what is no number of tokens; None stands for no limit of one's own.

    Raises:
        UnknownArgument: for anything but a positive whole number or None.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UnknownArgument(
            f"{argument}={value!r} is no number of tokens", fix="use a positive whole number, such as 2048"
        )
