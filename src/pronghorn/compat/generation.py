"""`model.generate` as scripts call it: with what `apply_chat_template` returned, whatever it returns today."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any


def add_generate(model: Any) -> None:
    """Let this instance's `generate` take a whole encoding where older Transformers gave, and took, its ids alone."""
    if "generate" not in model.__dict__:
        model.__dict__["generate"] = partial(generate, model)


def generate(model: Any, inputs: Any = None, *args: Any, **given: Any) -> Any:
    """The class's own `generate`; an encoding as `inputs` or `input_ids` becomes keyword arguments."""
    encoding = inputs if isinstance(inputs, Mapping) else given.get("input_ids")
    if isinstance(encoding, Mapping):
        inputs = None if encoding is inputs else inputs
        given = {**encoding, **{name: value for name, value in given.items() if value is not encoding}}
    if inputs is not None:
        args = inputs, *args
    return type(model).generate(model, *args, **given)
