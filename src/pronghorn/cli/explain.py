"""``pronghorn explain``: what an error means, by its code or by a pasted text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches

from pronghorn.cli.console import say, table, wrapped
from pronghorn.cli.unexpected import HOW_TO_REPORT
from pronghorn.diagnostics.catalogue import Entry, entry_of, error_classes
from pronghorn.diagnostics.translate import translate_text
from pronghorn.errors import CommandMisused

_LABELS = {"en": ("Cause", "Fix", "Example"), "zh": ("原因", "解决", "示例")}


def run(words: Sequence[str], language: str | None = None) -> int:
    """Explain a code, a class or an error's text; without any, list all codes. 1 when the text is not known."""
    language = language or _language()
    text = " ".join(words).strip()
    if not text:
        entries = [entry_of(kind, language) for kind in error_classes()]
        table("Errors", ("code", "class", "when"), [(e.code, e.name, e.when) for e in entries])
        return 0
    by_name = {kind.__name__.lower(): kind for kind in error_classes()}
    by_code = {kind.code.lower(): kind for kind in error_classes()}
    named = by_code.get(text.lower()) or by_name.get(text.lower())
    if named is not None:
        _print(entry_of(named, language), language)
        return 0
    if len(text) < 8 and " " not in text and text.lower().startswith("ph"):
        close = get_close_matches(text.lower(), by_code, n=3, cutoff=0.5)
        raise CommandMisused(
            f"there is no error {text}",
            fix=(f"one of {', '.join(by_code[c].code for c in close)}; " if close else "")
            + "`pronghorn explain` lists all",
        )
    found = translate_text(text)
    if found is None:
        say("This error is not in the catalogue.")
        say(HOW_TO_REPORT)
        return 1
    if found.fix:
        say(str(found) + "\n")
    _print(entry_of(type(found), language), language)
    return 0


def _language() -> str:
    """Chinese where the terminal's language is."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(name)
        if value:
            return "zh" if value.startswith("zh") else "en"
    return "en"


def _print(entry: Entry, language: str) -> None:
    cause, fix, example = _LABELS[language]
    say(f"{entry.code} {entry.name}")
    say(wrapped(entry.when, "  "))
    for label, text in ((cause, entry.cause), (fix, entry.fix), (example, entry.example)):
        if text:
            say(f"\n{label}")
            say(wrapped(text, "  "))
