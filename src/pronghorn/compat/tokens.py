"""New tokens, as scripts ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
