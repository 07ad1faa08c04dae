"""What is told about one error besides its class: why it happens, what helps, how it looks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """An error in two languages; when it occurs is, in English, its class's docstring.

    Args:
        cause, fix: English.
        example: a line as the command prints it, or a user meets it in another library's words.
        zh: when, cause and fix in Chinese.
    """

    cause: str
    fix: str
    example: str
    zh: tuple[str, str, str]
