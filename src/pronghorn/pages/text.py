"""Texts of others and sizes, as a page or a terminal shows them."""

from __future__ import annotations

import unicodedata
from html import escape

#: Categories whose characters say nothing to a reader, or do something to a terminal.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str, limit: int = 80) -> str:
    """Text from elsewhere for a terminal or a page: one line, cut, every unseen character spelled out."""
    cut = text[: limit + 1]
    seen = "".join(
        char if unicodedata.category(char) not in _UNSEEN else _spelled(char) for char in cut[:limit]
    )
    return seen + ("…" if len(cut) > limit else "")


def _spelled(char: str) -> str:
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char)
    return named or f"<U+{ord(char):04X}>"


def shown(text: str, limit: int) -> str:
    """A text of others on one line of a page, escaped."""
    return escape(visible(text, limit))


def lines(text: str) -> str:
    """The same with its line ends."""
    return "\n".join(shown(line, 1000) for line in text.split("\n"))


def size(count: int) -> str:
    """Bytes as 812 B, 1.2 kB, 3.4 GB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def short(count: int) -> str:
    """1,234 or 12k or 3.4M."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= limit:
            scaled = count / (1000 if unit == "k" else limit)
            return f"{scaled:.0f}{unit}" if scaled >= 100 or scaled == int(scaled) else f"{scaled:.1f}{unit}"
    return f"{count:,}"


def duration(seconds: float) -> str:
    """``8.1 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
