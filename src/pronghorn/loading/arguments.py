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


def check_eight_bit(kind: str, skip_layers: Any, modules: Any, copies: Any) -> tuple[str, ...] | None:
    """What `from_pretrained` takes alike for both kinds of 8-bit products; returns the modules.

    Args:
        kind: what the arguments' names begin with, "fp8" or "int8".
        skip_layers: None stands for a default.

    Raises:
        UnknownArgument: a value that does not exist.
    """
    if isinstance(copies, bool) or copies not in (1, 2):
        raise UnknownArgument(f"{kind}_copies={copies!r} does not exist", fix="use 1 or 2")
    if skip_layers is not None and (
        isinstance(skip_layers, bool) or not isinstance(skip_layers, int) or skip_layers < 0
    ):
        raise UnknownArgument(
            f"{kind}_skip_layers={skip_layers!r} is no number of layers", fix="use a whole number, such as 2"
        )
    names = None if modules is None or not isinstance(modules, Iterable) else tuple(modules)
    if isinstance(modules, str) or (modules is not None and names is None) or not _are_texts(names):
        raise UnknownArgument(
            f"{kind}_modules={modules!r} is no list of names", fix='use such as ["gate_proj", "up_proj"]'
        )
    return names


def _are_texts(names: Iterable[Any] | None) -> bool:
    return all(isinstance(name, str) for name in names or ())


def tell_eight_bit(kind: str, done: int, kept: list[str], options: Any) -> None:
    """What 8-bit products did not take.

    Args:
        done: how many linear layers they did take.
        kept: names of those that were chosen and stay as they are.

    Raises:
        UnknownArgument: they took none.
    """
    if not done:
        raise UnknownArgument(
            f"no linear layer is left to quantise ({kind}_skip_layers={options.skip_layers}, "
            f"{kind}_modules={options.modules})",
            fix=f"skip fewer layers, or leave out load_in_{kind}",
        )
    if kept:
        logger.warning(
            "pronghorn: %d linear layers stay as they are, first %s: %s takes sizes that are multiples of 16",
            len(kept),
            kept[0],
            kind,
        )
