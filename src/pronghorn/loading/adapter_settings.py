"""Settings of a LoRA that PEFT would take without effect, or stumble over later: refused first, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pronghorn.engine import base_causal_lm
from pronghorn.errors import AdapterProblem, TargetModuleNotFound, UnknownArgument, nearest

#: Beginnings that PEFT makes of random numbers, and of others when it loads the adapter.
_DRAWN_AGAIN = "pissa_niter"


def refuse_other_kinds(given: Mapping[str, Any]) -> None:
    """Fields of `LoraConfig` that say what an adapter is for: here they can only say what it is.

    Raises:
        UnknownArgument: another method or task than LoRA of a causal model, or an adapter that is not trained.
    """
    # An embedding model's adapter is one for "FEATURE_EXTRACTION".
    for name, known in (("peft_type", ("LORA",)), ("task_type", ("CAUSAL_LM", "FEATURE_EXTRACTION"))):
        if given.get(name) not in (None, *known):
            raise UnknownArgument(
                f"{name}={given[name]!r} is something else than LoRA on a causal language model",
                fix=f"leave it out: it is '{known[0]}'; another kind of adapter is made with peft.get_peft_model",
            )
    if given.get("inference_mode"):
        raise UnknownArgument(
            "inference_mode=True makes a new adapter that is not trained and changes nothing",
            fix="leave it out",
        )


def check_settings(model: Any, settings: dict[str, Any]) -> None:
    """
    Raises:
        UnknownArgument: a number outside its range.
        TargetModuleNotFound: a layer, a token or a name in a pattern that the model does not have.
        AdapterProblem: settings whose saved adapter would be another, or that the model's layers do not allow.
    """
    _check_numbers(model, settings)
    _check_tokens(model, settings.get("trainable_token_indices"))
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    for argument in ("rank_pattern", "alpha_pattern"):
        _check_patterns(settings.get(argument) or {}, names, argument)
    excluded = settings.get("exclude_modules")
    if isinstance(excluded, list | tuple | set):
        _check_patterns(excluded, names, "exclude_modules")
    if str(settings.get("init_lora_weights")).startswith(_DRAWN_AGAIN):
        raise AdapterProblem(
            f"init_lora_weights='{settings['init_lora_weights']}' takes a part out of the base that PEFT finds with "
            "random numbers, and finds otherwise when it loads the adapter: what is saved would be another model",
            fix="use 'pissa', which finds the same each time",
        )
    if settings.get("layer_replication") and getattr(base_causal_lm(model).config, "layer_types", None):
        raise AdapterProblem(
            "layer_replication adds layers to a model whose config says the kind of each (layer_types), which PEFT "
            "does not extend",
            fix="leave it out, or replicate layers in the checkpoint",
        )


def _check_numbers(model: Any, settings: dict[str, Any]) -> None:
    rank, dropout, alpha = (
        settings.get("r", 8),
        settings.get("lora_dropout", 0.0),
        settings.get("lora_alpha", 8),
    )
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UnknownArgument(f"r={rank!r} is no rank", fix="use a positive whole number, such as 16")
    if not isinstance(alpha, int | float) or alpha <= 0:
        raise UnknownArgument(
            f"lora_alpha={alpha!r} is no positive number: the adapter would have no effect",
            fix="use such as 16",
        )
    if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise UnknownArgument(f"lora_dropout={dropout!r} is no probability below 1", fix="use 0.0 to 0.99")
    chosen = settings.get("layers_to_transform")
    count = base_causal_lm(model).config.get_text_config().num_hidden_layers
    for index in [chosen] if isinstance(chosen, int) else list(chosen or []):
        if not 0 <= index < count:
            raise TargetModuleNotFound(
                f"layers_to_transform has layer {index}, the model has {count}", fix=f"use 0 to {count - 1}"
            )


def _check_tokens(model: Any, tokens: Any) -> None:
    """Rows of embeddings that are trained alone: of the input's, or of several modules by name."""
    count = model.get_input_embeddings().weight.shape[0]
    for chosen in tokens.values() if isinstance(tokens, dict) else [tokens or []]:
        for token in chosen:
            if not isinstance(token, int) or not 0 <= token < count:
                raise TargetModuleNotFound(
                    f"trainable_token_indices has {token!r}, the model embeds {count} tokens",
                    fix=f"use 0 to {count - 1}",
                )


def _check_patterns(patterns: Iterable[str], names: list[str], argument: str) -> None:
    """Ends of names, or regular expressions for them, as PEFT reads them."""
    for pattern in patterns:
        try:
            found = any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names)
        except re.error as error:
            raise TargetModuleNotFound(
                f"{argument} has '{pattern}', which is no regular expression: {error}",
                fix="give the name of a module",
            ) from error
        if not found:
            endings = sorted({end for name in names if not (end := name.rpartition(".")[2]).isdigit()})
            raise TargetModuleNotFound(
                f"{argument} has '{pattern}', which the model does not have",
                fix=nearest(pattern, endings) or f"its modules are {', '.join(endings)}",
            )
