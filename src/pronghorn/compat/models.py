"""`FastLanguageModel` and its like for scripts: their model ids, arguments, and the methods they call on a model."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from pronghorn import loading
from pronghorn.compat.generation import add_methods
from pronghorn.compat.model_ids import meant_by
from pronghorn.compat.tokens import add_older_calls
from pronghorn.engine import base_causal_lm
from pronghorn.errors import DropInUnavailable, HubUnreachable, ModelNotFound, UnknownArgument, nearest
from pronghorn.loading.adapters import DEFAULT_TARGETS
from pronghorn.loading.arguments import note_without_effect, refuse_pair
from pronghorn.loading.fast import bind_with
from pronghorn.loading.saving import add_save_methods

logger = logging.getLogger("pronghorn")

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
        _refuse_classes(kwargs.pop("auto_model", None), kwargs.pop("num_labels", None))
        kwargs = _as_ours(kwargs)
        if kwargs.get("fast_inference"):
            logger.warning(
                "pronghorn: fast_inference=True changes nothing, as vLLM has no part here; "
                "model.fast_generate is answered by pronghorn's engine"
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
        base_causal_lm(model).__dict__ |= {"script_tokenizer": tokenizer, "script_trains_all": bool(whole)}
        add_older_calls(tokenizer)
        add_methods(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(model: Any = None, *args: Any, model_name: Any = None, **kwargs: Any) -> Any:
        """As `pronghorn.FastVisionModel.get_peft_model`; with `model_name` the model is loaded first.

        Returns:
            the model with its adapter, and with `model_name` (model, tokenizer).
        """
        tokenizer = None
        if model is None or isinstance(model, str):
            named = model if model_name is None else model_name
            if named is None:
                raise TypeError("get_peft_model() needs a model, or model_name=")
            loads = {name: kwargs.pop(name) for name in [*kwargs] if name in _LOADING - _SHARED}
            shared = {name: kwargs[name] for name in [*kwargs] if name in _SHARED}
            model, tokenizer = FastLanguageModel.from_pretrained(named, **loads, **shared)
        kwargs.pop("images", None)
        if _has_what_it_needs(model, args, kwargs):
            return model if tokenizer is None else (model, tokenizer)
        _leave_out_missing(model, kwargs)
        adapted = loading.FastVisionModel.get_peft_model(model, *args, **kwargs)
        add_methods(adapted)
        return adapted if tokenizer is None else (adapted, tokenizer)

    @staticmethod
    def patch_peft_model(model: Any, use_gradient_checkpointing: bool | str = "unsloth") -> Any:
        """The fast path and the methods of scripts on a model that PEFT itself has put an adapter on. Returns it."""
        bind_with(model, use_gradient_checkpointing)
        add_save_methods(model)
        add_methods(model)
        return model


#: Arguments that both functions have.
_SHARED = {*inspect.signature(loading.FastLanguageModel.get_peft_model).parameters} & _LOADING


class FastModel(FastLanguageModel):
    """The name for models of any kind: those that read images come with their processor."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        return FastLanguageModel.from_pretrained(*args, **{"images": None, **kwargs})

    @staticmethod
    def get_peft_model(model: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Unsloth's: adapters on the vision tower, too, unless the script says otherwise."""
        return FastLanguageModel.get_peft_model(
            model, *args, **{"images": None, "finetune_vision_layers": True, **kwargs}
        )


class FastVisionModel(FastModel):
    """The name for models that read images."""


class FastTextModel(FastLanguageModel):
    """The name for text models."""


class UnslothModel(FastLanguageModel):
    """The name in older scripts."""


def _has_what_it_needs(model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> bool:
    """Whether `get_peft_model` leaves a model as it is: one that is trained whole, or has that very adapter already."""
    refuse_pair(model)
    if base_causal_lm(model).__dict__.get("script_trains_all"):
        logger.warning(
            "pronghorn: full_finetuning=True trains the weights themselves: no adapter is put on them"
        )
        return True
    own = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    if own is None:
        return False
    asked = {**dict(zip(("r", "target_modules", "lora_alpha", "lora_dropout"), args, strict=False)), **given}
    usual = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "use_rslora": False}
    targets = asked.get("target_modules")
    whole = {"embed_tokens", "lm_head"}  # which are among modules_to_save then
    same = not isinstance(targets, list | tuple) or set(targets) - whole == set(own.target_modules) - whole
    if not same or any(asked.get(name, value) != getattr(own, name) for name, value in usual.items()):
        return False
    more = {name for name in given if hasattr(own, name)} - {*usual, "target_modules", "modules_to_save"}
    if any((given[name] or None) != (getattr(own, name) or None) for name in more):
        return False
    logger.warning("pronghorn: the model has this adapter already, which is trained on")
    return True


def _leave_out_missing(model: Any, given: dict[str, Any]) -> None:
    """Take names out of a list of target modules that a model has no module of, as PEFT does: lists are copied from one
    model to the next. One that would leave nothing, or that is nearly a name, stays for the refusal."""
    targets = given.get("target_modules")
    if not isinstance(targets, list | tuple) or not all(isinstance(name, str) for name in targets):
        return
    names = {part for path, _ in model.named_modules() for part in _endings(path)}
    missing = [
        name
        for name in targets
        if name not in names and name not in DEFAULT_TARGETS and not nearest(name, names)
    ]
    if missing and len(missing) < len(targets):
        logger.warning("pronghorn: target_modules has %s, which the model does not have", ", ".join(missing))
        given["target_modules"] = [name for name in targets if name not in missing]


def _endings(path: str) -> list[str]:
    """A module's name in all lengths: up_proj, mlp.up_proj, …"""
    parts = path.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


#: Arguments of Transformers' `from_pretrained` that scripts pass on, without a counterpart here.
_WITHOUT_EFFECT = frozenset(
    {"device_map_planner_kwargs", "low_cpu_mem_usage", "use_cache", "use_fast", "use_safetensors"}
)


def _as_ours(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Transformers' `from_pretrained`, which Unsloth's passes on, under the names that they have here.

    Raises:
        UnknownArgument: for one that would have changed where files are looked for.
    """
    given = dict(given)
    unused = {name: given.pop(name) for name in [*given] if name in _WITHOUT_EFFECT}
    note_without_effect(unused, "from_pretrained")
    for name, fix in (("cache_dir", "set HF_HOME"), ("local_files_only", "set HF_HUB_OFFLINE=1")):
        if given.pop(name, None):
            raise UnknownArgument(
                f"from_pretrained() has no argument '{name}'",
                fix=f"{fix} in the environment before Python starts",
            )
    if given.get("torch_dtype") is not None and given.get("dtype") is None:
        given["dtype"] = given["torch_dtype"]
    given.pop("torch_dtype", None)
    if given.get("device_map") in ("unsloth", "sequential"):  # one GPU, as without it
        del given["device_map"]
    bits = given.pop("quantization_config", None)
    if bits is None:
        return given
    if type(bits).__name__ != "BitsAndBytesConfig":
        raise UnknownArgument(
            f"quantization_config={type(bits).__name__}(...) is not followed here",
            fix="load_in_4bit=True or load_in_8bit=True",
        )
    found = {"load_in_4bit": bits.load_in_4bit, "load_in_8bit": bits.load_in_8bit}
    if bits.load_in_4bit:
        found |= {
            "bnb_4bit_quant_type": bits.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": bits.bnb_4bit_use_double_quant,
        }
    return {**given, **found}


def _refuse_classes(auto_model: Any, num_labels: int | None) -> None:
    """Which class a checkpoint is of, it says itself; a class that predicts no tokens is asked for in vain.

    Raises:
        DropInUnavailable: for one that classifies or writes down speech.
    """
    name = getattr(auto_model, "__name__", str(auto_model or ""))
    if any(part in name for part in ("Csm", "Speech", "Whisper")):
        raise DropInUnavailable(
            f"auto_model={name} asks for a speech model that is not trained here",
            fix="Transformers' and PEFT's own classes; Orpheus is a Llama, which FastLanguageModel trains, and "
            "Fish-Speech is trained by pronghorn speech",
        )
    if num_labels is not None or "Classification" in name:
        raise DropInUnavailable(
            f"{name or f'num_labels={num_labels}'} asks for a model that predicts no text, which is not trained here",
            fix="Transformers' and PEFT's own classes; or let the model write the label as its answer",
        )
    if auto_model is not None:
        logger.warning("pronghorn: auto_model= has no effect: the checkpoint says which class it is of")


def _chooses_precision(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the script says itself how weights are stored; load_in_4bit is the fourth argument by position."""
    return len(args) >= 3 or any(
        kwargs.get(name) not in (None, False) for name in ("load_in_8bit", "load_in_fp8", "load_in_int8")
    ) or kwargs.get("load_in_4bit") is not None  # fmt: skip
