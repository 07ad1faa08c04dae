"""Model ids under `unsloth/`: which original model is meant, and whether it is to be loaded in 4 bits."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

OWNER = "unsloth/"
_FOUR_BIT = re.compile(r"(-unsloth)?-bnb-4bit$", re.IGNORECASE)

#: Ids whose original has another name; in lower case, without `unsloth/` and the ending of 4-bit checkpoints.
ORIGINALS = {
    "codellama-7b": "codellama/CodeLlama-7b-hf",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3-70b-instruct": "meta-llama/Meta-Llama-3-70B-Instruct",
    "meta-llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "meta-llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "meta-llama-3.1-70b-instruct": "meta-llama/Llama-3.1-70B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct-v0.1": "mistralai/Mistral-7B-Instruct-v0.1",
    "mistral-7b-instruct-v0.2": "mistralai/Mistral-7B-Instruct-v0.2",
    "mistral-7b-instruct-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "tinyllama-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "zephyr-sft": "HuggingFaceH4/mistral-7b-sft-beta",
}

#: Ids whose original has the same name under its maker: beginning of the name -> maker.
MAKERS = {
    "llama-3": "meta-llama",
    "mistral-nemo": "mistralai",
    "qwen": "Qwen",
    "smollm": "HuggingFaceTB",
    "deepseek-r1-distill": "deepseek-ai",
    "gemma": "google",
}

_MODELS: ContextVar[Mapping[str, str]] = ContextVar("models", default={})  # noqa: B039 (never changed, only replaced)


@dataclass(frozen=True)
class Meant:
    """What a model's name in a script stands for.

    Args:
        name: a folder or a hub id.
        four_bit: the name says that the weights are to be in 4 bits.
        mirror: the id as it was, where the hub has it too.
    """

    name: str
    four_bit: bool = False
    mirror: str | None = None


def redirect(models: Mapping[str, str]) -> None:
    """Models to load in place of those that a script names; "" stands for every id under `unsloth/`."""
    _MODELS.set(dict(models))


def meant_by(model_name: str | os.PathLike[str]) -> Meant:
    """What to load for a name: what the user redirected it to, else a local folder of that name or what was downloaded
    under it before, else the original."""
    name = os.fspath(model_name)
    four_bit = name.startswith(OWNER) and _FOUR_BIT.search(name) is not None
    models = _MODELS.get()
    if name in models:
        return Meant(models[name], four_bit)
    if os.path.exists(name) or not name.startswith(OWNER):
        return Meant(name)
    if "" in models:
        return Meant(models[""], four_bit)
    if _is_downloaded(name):
        return Meant(name)
    short = _FOUR_BIT.sub("", name.removeprefix(OWNER))
    original = ORIGINALS.get(short.lower()) or next(
        (f"{maker}/{short}" for beginning, maker in MAKERS.items() if short.lower().startswith(beginning)),
        None,
    )
    return Meant(name) if original is None else Meant(original, four_bit, mirror=name)


def _is_downloaded(name: str) -> bool:
    """Whether the hub's cache on this machine has the repository; its weights are stored as they are to be used."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False
