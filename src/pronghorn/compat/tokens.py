"""New tokens as scripts ask for them, and token ids of conversations in the form that scripts expect."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from pronghorn.compat.aliases import asked_by_user
from pronghorn.data.chat_templates.choose import add_tokens
from pronghorn.errors import ChatTemplateMismatch
from pronghorn.loading.arguments import refuse_other_than


def add_new_tokens(
    model: Any,
    tokenizer: Any,
    new_tokens: Sequence[str] = (),
    method: str = "mean",
    interpolation: float = 0.5,
) -> None:
    """Tokens that are whole from now on, with rows in the model's embeddings that begin as the mean of the others.

    Args:
        method: "mean"; "interpolation" mixes the mean with the pieces' own there, and begins as the mean here.

    Raises:
        ChatTemplateMismatch: the model has an adapter already, which would not learn them.
    """
    refuse_other_than(method, ("mean", "interpolation"), "method")
    if hasattr(model, "peft_config"):
        raise ChatTemplateMismatch(
            "the model has an adapter already, which would not learn new tokens",
            fix="call add_new_tokens before get_peft_model, with embed_tokens and lm_head among its target_modules",
        )
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    known = inner.get_vocab()
    missing = [token for token in dict.fromkeys(new_tokens) if token not in known]
    if missing:
        add_tokens(inner, missing, model)


class TokenIds(list[Any]):
    """What `apply_chat_template` gives without `return_tensors`: token ids, as before Transformers 5, with the names of
    today's dictionary besides."""

    def __init__(self, encoding: Mapping[str, Any]) -> None:
        super().__init__(encoding["input_ids"])
        self.encoding = dict(encoding)

    def __getitem__(self, key: Any) -> Any:
        return self.encoding[key] if isinstance(key, str) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["encoding"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenIds, (self.encoding,)

    def keys(self) -> Any:
        return self.encoding.keys()


class TokenTensors(BatchEncoding):
    """The same with `return_tensors`: today's dictionary, which answers as the tensor of ids that it was."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.data["input_ids"][key]

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})
        if name in data:
            return data[name]
        if name.startswith("_") or "input_ids" not in data:
            raise AttributeError(name)
        return getattr(data["input_ids"], name)


def add_older_calls(tokenizer: Any) -> None:
    """Let this instance's `apply_chat_template` answer scripts as it did; libraries get what it gives today."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.__dict__["apply_chat_template"] = partial(_apply_chat_template, tokenizer)


def _apply_chat_template(tokenizer: Any, *args: Any, **given: Any) -> Any:
    made = type(tokenizer).apply_chat_template(tokenizer, *args, **given)
    if given.get("return_dict") is not None or not isinstance(made, BatchEncoding):
        return made
    if not asked_by_user(sys._getframe(1)):
        return made
    tensors = given.get("return_tensors") is not None
    return TokenTensors(dict(made)) if tensors else TokenIds(dict(made))
