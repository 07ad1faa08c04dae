"""Texts become tokens: cut to the longest length, with an ending where the last token's vector is the text's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from pronghorn.errors import RowInvalid, TokenizerProblem

logger = logging.getLogger("pronghorn")

_TEXTS_AT_A_TIME = 1024


def end_with_token(tokenizer: Any) -> None:
    """Let the tokenizer end every text with its EOS token, where it ends it with no special token yet.

    It is written into the tokenizer's own processing, so that it is saved with it and whoever loads it does the same.

    Raises:
        TokenizerProblem: it has no EOS token, or is not of the kind that says how texts end.
    """
    ids = tokenizer("a")["input_ids"]
    if ids and ids[-1] in tokenizer.all_special_ids:
        return
    if tokenizer.eos_token is None or not getattr(tokenizer, "is_fast", False):
        raise TokenizerProblem(
            "last-token pooling needs a tokenizer that ends texts with a token of its own, and this one cannot",
            fix="use pooling='mean', or a tokenizer with an EOS token",
        )
    from tokenizers.processors import Sequence as Steps
    from tokenizers.processors import TemplateProcessing

    ending = TemplateProcessing(
        single="$A " + tokenizer.eos_token, special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    before = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = ending if before is None else Steps([before, ending])
    logger.info("pronghorn: texts end with %s, whose vector is theirs", tokenizer.eos_token)


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int | None) -> list[np.ndarray]:
    """Token ids of each text, int32 [t], special tokens included, at most `max_length` of them.

    Raises:
        RowInvalid: a text without a single token.
    """
    found: list[np.ndarray] = []
    for start in range(0, len(texts), _TEXTS_AT_A_TIME):
        part = list(texts[start : start + _TEXTS_AT_A_TIME])
        encoded = tokenizer(part, truncation=max_length is not None, max_length=max_length)["input_ids"]
        for text, ids in zip(part, encoded, strict=True):
            if not ids:
                raise RowInvalid(
                    f"the text {text[:40]!r} has no tokens", where=f"text {len(found)}", fix="leave it out"
                )
            found.append(np.asarray(ids, dtype=np.int32))
    return found
