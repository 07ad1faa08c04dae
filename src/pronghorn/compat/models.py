"""`FastLanguageModel` and its like for scripts: their model ids, arguments, and the methods they call on a model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any

from pronghorn import loading
from pronghorn.compat.generation import add_generate
from pronghorn.compat.model_ids import meant_by
from pronghorn.errors import (
    DropInUnavailable,
    HubUnreachable,
    ModelNotFound,
    UnsupportedCheckpoint,
)

logger = logging.getLogger("pronghorn")

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
#: What `get_peft_model(model_name=...)` hands to the loader; the rest belongs to the adapter.
_LOADING = {*inspect.signature(loading.FastLanguageModel.from_pretrained).parameters} - {"kwargs"}


class FastLanguageModel(loading.FastLanguageModel):
    """`pronghorn.FastLanguageModel`, with `unsloth/` ids and with saving and uploading methods on the model."""

    @staticmethod
    def from_pretrained(model_name: Any = "unsloth/Llama-3.2-1B-Instruct", *args: Any, **kwargs: Any) -> Any:
        """As `pronghorn.FastLanguageModel.from_pretrained`; see `model_ids.meant_by` for the name.

        Returns:
            (model, tokenizer).
        """
        if kwargs.pop("auto_model", None) is not None:
            raise DropInUnavailable(
                "auto_model= chooses a class with image or audio inputs", fix="leave it out: text models only"
            )
        meant = meant_by(model_name)
        whole = kwargs.get("full_finetuning", False)
        if meant.four_bit and not whole and not _chooses_precision(args, kwargs):
            kwargs["load_in_4bit"] = True
        if meant.name != model_name:
            bits = " in 4 bits" if kwargs.get("load_in_4bit") else ""
            logger.warning("pronghorn: '%s' is loaded from '%s'%s", model_name, meant.name, bits)
        try:
            model, tokenizer = loading.FastLanguageModel.from_pretrained(meant.name, *args, **kwargs)
        except ModelNotFound as error:
            if meant.mirror is None or isinstance(error, HubUnreachable):
                raise
            logger.warning("pronghorn: %s; the copy '%s' is loaded instead", error.message, meant.mirror)
            model, tokenizer = loading.FastLanguageModel.from_pretrained(meant.mirror, *args, **kwargs)
        except UnsupportedCheckpoint as error:
            if not _reads_images(meant.name):
                raise
            raise DropInUnavailable(
                f"'{meant.name}' is a model for images and text, and models are trained on text here",
                fix="load a text model of its family, or train this one with its own library",
            ) from error
        add_generate(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: Any = None,
        *args: Any,
        model_name: Any = None,
        finetune_vision_layers: bool = False,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As `pronghorn.FastLanguageModel.get_peft_model`; with `model_name` the model is loaded first.

        Args:
            finetune_attention_modules, finetune_mlp_modules: which projections get an adapter, where `target_modules`
                does not say.

        Returns:
            the model with its adapter, and with `model_name` (model, tokenizer).
        """
        if not finetune_language_layers or not (finetune_attention_modules or finetune_mlp_modules):
            raise DropInUnavailable(
                "the adapter would be on nothing but vision layers, which are not loaded here",
                fix="finetune_language_layers=True with finetune_attention_modules or finetune_mlp_modules",
            )
        if finetune_vision_layers:
            logger.warning("pronghorn: finetune_vision_layers=True has no effect: the text model is trained")
        if not (finetune_attention_modules and finetune_mlp_modules) and _default_targets(kwargs):
            kwargs["target_modules"] = [*(_ATTENTION if finetune_attention_modules else _MLP)]
        tokenizer = None
        if model is None or isinstance(model, str):
            named = model if model_name is None else model_name
            if named is None:
                raise TypeError("get_peft_model() needs a model, or model_name=")
            loads = {name: kwargs.pop(name) for name in [*kwargs] if name in _LOADING - _SHARED}
            shared = {name: kwargs[name] for name in [*kwargs] if name in _SHARED}
            model, tokenizer = FastLanguageModel.from_pretrained(named, **loads, **shared)
        adapted = loading.FastLanguageModel.get_peft_model(model, *args, **kwargs)
        add_generate(adapted)
        return adapted if tokenizer is None else (adapted, tokenizer)


#: Arguments that both functions have.
_SHARED = {*inspect.signature(loading.FastLanguageModel.get_peft_model).parameters} & _LOADING


class FastModel(FastLanguageModel):
    """The name for models of any kind; text models here."""


class FastTextModel(FastLanguageModel):
    """The name for text models."""


class UnslothModel(FastLanguageModel):
    """The name in older scripts."""


class FastVisionModel(FastLanguageModel):
    """The text part of it: loading, adapters and training on text. Images are refused, by a message."""

    @staticmethod
    def get_peft_model(model: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("finetune_vision_layers", True)  # says once that vision layers stay out
        return FastLanguageModel.get_peft_model(model, *args, **kwargs)


def _reads_images(name: str) -> bool:
    """Whether a model's configuration, which is on the disk by now, has a part for images."""
    from transformers import AutoConfig

    try:
        return hasattr(AutoConfig.from_pretrained(name, local_files_only=True), "vision_config")
    except (OSError, ValueError):
        return False


def _default_targets(kwargs: dict[str, Any]) -> bool:
    given: str | Iterable[str] | None = kwargs.get("target_modules")
    return given is None or given == "all-linear"


def _chooses_precision(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the script says itself how weights are stored; load_in_4bit is the fourth argument by position."""
    return len(args) >= 3 or any(
        kwargs.get(name) not in (None, False) for name in ("load_in_8bit", "load_in_fp8", "load_in_int8")
    ) or kwargs.get("load_in_4bit") is not None  # fmt: skip
