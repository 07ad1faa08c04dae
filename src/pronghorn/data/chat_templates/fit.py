"""Whether a tokenizer has the tokens that a chat template writes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

#: What models' control tokens look like in a template of the user's own.
_CONTROL = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?(?:start|end)_of_turn>|</?s>|\[/?[A-Z][A-Z_]{2,}\]")


def pieces(tokenizer: Any, marker: str) -> list[str]:
    """The tokens that a marker becomes; one of its own name where the tokenizer knows it."""
    ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]


def is_whole(tokenizer: Any, marker: str) -> bool:
    """Whether a marker is one token wherever it stands: an added or special token, not a word that may merge."""
    return marker in tokenizer.get_added_vocab() or (
        marker in tokenizer.all_special_tokens and pieces(tokenizer, marker) == [marker]
    )


def missing_markers(tokenizer: Any, markers: Iterable[str]) -> list[str]:
    """Those that the tokenizer would cut into pieces, in their order."""
    return [marker for marker in dict.fromkeys(markers) if not is_whole(tokenizer, marker)]


def difference(tokenizer: Any, missing: Iterable[str]) -> str:
    """``'<|im_end|>' becomes 6 tokens (< | im _ end |>)`` for each missing marker."""
    parts = []
    for marker in missing:
        found = pieces(tokenizer, marker)
        parts.append(f"'{marker}' becomes {len(found)} token{'s' * (len(found) != 1)} ({' '.join(found)})")
    return ", ".join(parts)


def control_tokens(text: str) -> list[str]:
    """What looks like a control token in a text, each once."""
    return list(dict.fromkeys(_CONTROL.findall(text)))


def puts_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins every text with BOS."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
