"""Arguments of the command, with the name that was probably meant where one is unknown."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from pronghorn.errors import nearest

_CHOICE = re.compile(r"invalid choice: '(?P<given>[^']*)' \(choose from (?P<known>.*)\)$")


class Parser(argparse.ArgumentParser):
    """argparse's own, which lists all that is known and names nothing."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            chosen = self._chosen(getattr(options, "command", ""))
            chosen.error(f"unrecognized arguments: {' '.join(rest)}{_hint(rest[0], chosen.options())}")
        return options

    def error(self, message: str) -> NoReturn:
        if choice := _CHOICE.search(message):
            known = re.findall(r"[\w.-]+", choice["known"])
            message += _hint(choice["given"], known)
        super().error(message)

    def options(self) -> list[str]:
        """The names of options, such as --set."""
        return [name for action in self._actions for name in action.option_strings]

    def _chosen(self, command: str) -> Parser:
        """The subcommand's parser of that name; this one where there is none."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and isinstance(
                found := action.choices.get(command), Parser
            ):
                return found
        return self


def _hint(given: str, known: list[str]) -> str:
    guess = nearest(given.partition("=")[0], known)
    return f"; {guess}" if guess else ""
