"""Which of Transformers' automatic classes loads a model."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any, *, images: bool = False, architecture: str | None = None) -> Any:
    """`AutoModelForCausalLM`; for a model that reads images `AutoModelForImageTextToText`, where the other has no class
    for the config, or has another than `architecture`, or `images` asks for it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text, reader = (auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForImageTextToText))
    kind = type(config)
    if kind not in reader or architecture in _names(text, kind):
        return AutoModelForCausalLM
    if images or kind not in text or architecture in _names(reader, kind):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _names(mapping: Any, kind: type) -> tuple[str, ...]:
    """Names of the classes that a mapping has for a config class."""
    if kind not in mapping:
        return ()
    found = mapping[kind]
    return tuple(cls.__name__ for cls in (found if isinstance(found, tuple) else (found,)))
