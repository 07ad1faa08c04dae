"""Tokens to text as they come: letters are never cut, and stop strings are found wherever tokens begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from pronghorn.data.answers import TokenTexts

REPLACEMENT = "\ufffd"
# UTF-8 takes four bytes a letter at most, so the last three tokens may have begun one that is not whole yet.
UNFINISHED = 3


class TextDecoder:
    """The text of a growing answer, a piece a token. The pieces put together are the decoded answer.

    A token that is a part of a letter gives no text until the letter is whole; bytes that are no letter become U+FFFD,
    as in `tokenizer.decode`, once nothing that follows can change that. Special tokens have no text.

    Args:
        before: tokens that the answer goes on from. A tokenizer that takes the space off a first word keeps it then.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Decoding these gives text that was handed out (or belongs to the prompt), and what later text depends on.
        self._told = list(before)[-2 * UNFINISHED :]
        self._told_text = self._decoded(self._told)
        self._waiting: list[int] = []

    def feed(self, token: int) -> str:
        self._waiting.append(token)
        text = self._decoded(self._told + self._waiting)
        if not text.endswith(REPLACEMENT):
            return self._hand_out(len(self._waiting), text)
        ready = len(self._waiting) - UNFINISHED
        return self._hand_out(ready, self._decoded(self._told + self._waiting[:ready])) if ready > 0 else ""

    def finish(self) -> str:
        """What was held back: nothing, or U+FFFD for a letter that was never completed."""
        return self._hand_out(len(self._waiting), self._decoded(self._told + self._waiting))

    def _hand_out(self, count: int, text: str) -> str:
        piece = text[len(self._told_text) :]
        handed = self._waiting[:count]
        self._waiting = self._waiting[count:]
        # Tokens without text (special ones) stay in the window: the next word must still see what stands before it.
        self._told = handed if piece else self._told + handed
        self._told_text = self._decoded(self._told)
        return piece

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings:
    """Cuts a text at the first stop string. The end of the text so far that may begin one is held back.

    First is the one that is complete first (of two that end together, the longer), so that the pieces in which the
    text comes make no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """The text that is certain now. After a stop string was found there is no more."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when the answer ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of `text` that `stop` begins with; less than all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class TokenNames:
    """How single tokens are shown beside their log-probabilities: their text, and the bytes they stand for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)

    def text(self, token: int) -> str:
        return self._texts([token])[0]

    def bytes(self, token: int) -> list[int] | None:
        """The token's bytes; None where the tokenizer does not tell those of a part of a letter."""
        text = self.text(token)
        if REPLACEMENT not in text:
            return list(text.encode("utf-8"))
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if len(name) == 6 and name.startswith("<0x"):
            return [int(name[3:5], 16)]
        known = _byte_letters()
        return [known[letter] for letter in name] if all(letter in known for letter in name) else None


@cache
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable ones stand for themselves, the others in
    order for U+0100 and what follows."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
