"""Arguments that several subcommands take."""

from __future__ import annotations

import argparse

from pronghorn.errors import CommandMisused


def add_run_file(command: argparse.ArgumentParser) -> None:
    """The file of a run as `config`, and changes of its values as `overrides`."""
    command.add_argument("config", metavar="CONFIG.yaml")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="change one value, such as training.max_steps=10 (repeatable)",
    )


def add_model(command: argparse.ArgumentParser) -> None:
    """A model or an adapter as `model`."""
    command.add_argument("model", metavar="MODEL_OR_ADAPTER", help="a folder, a .gguf file or a hub id")


def add_adapters(command: argparse.ArgumentParser) -> None:
    """The model's adapters as `adapters`, for `read_adapters`."""
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        dest="adapters",
        metavar="NAME=PATH",
        help="an adapter of the model, and what it is called (repeatable)",
    )


def read_adapters(given: list[str]) -> dict[str, str]:
    """NAME=PATH arguments as name -> path.

    Raises:
        CommandMisused: for one without a name or a path, or two of one name.
    """
    found: dict[str, str] = {}
    for item in given:
        name, _, path = item.partition("=")
        if not name.strip() or not path:
            raise CommandMisused(
                f"--adapter {item} has no name or no path",
                fix="write it as NAME=PATH, such as legal=outputs/legal",
            )
        if name in found:
            raise CommandMisused(f"two adapters are called '{name}'", fix="rename one")
        found[name] = path
    return found
