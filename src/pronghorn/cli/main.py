"""The command ``pronghorn`` and its subcommands. The library is imported by the chosen one only."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from pronghorn import __version__
from pronghorn.cli.arguments import add_model, add_run_file
from pronghorn.cli.numbers import not_negative, positive
from pronghorn.cli.parser import Parser
from pronghorn.errors import PronghornError
from pronghorn.importing import collector_paused

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
#: Commands that are run by `run(options)` of the module of their name.
_MODULES = (
    "chat", "plan", "lr-find", "search", "data", "run", "export", "serve", "compare-adapters", "curves", "compare",
    "stress", "speech", "embed", "quantise",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for a mistake that is explained, 130 when interrupted."""
    options = build_parser().parse_args(argv)
    try:
        return int(_commands()[options.command](options))
    except PronghornError as error:
        if options.debug:
            raise
        print(f"pronghorn: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as interruption:
        print(f"\npronghorn: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe went away (`pronghorn doctor | head`). Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug:
            raise
        from pronghorn.cli.unexpected import explain

        return explain(error)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="pronghorn",
        description="Fine-tune language models fast and in little memory, on stock Hugging Face checkpoints.",
    )
    parser.add_argument("--version", action="version", version=f"pronghorn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_train(commands)
    _add_quickstart(commands)
    _add_chat(commands)
    _add_modules(commands)
    _add_doctor(commands)
    _add_explain(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="let errors show their traceback")
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a model as a YAML file describes it")
    add_run_file(train)
    train.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the output folder"
    )
    train.add_argument("--json", action="store_true", help="end with one line of JSON: losses, time, paths")


def _add_quickstart(commands: Any) -> None:
    quickstart = commands.add_parser(
        "quickstart", help="fine-tune a real 135M model on real data, on any machine"
    )
    quickstart.add_argument("--out", default="outputs/quickstart", metavar="DIR")
    quickstart.add_argument(
        "--steps", type=positive, metavar="N", help="training steps (default: by hardware)"
    )


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser("chat", help="talk to a model or an adapter")
    add_model(chat)
    chat.add_argument("--prompt", metavar="TEXT", help="answer this once instead of opening a conversation")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--max-new-tokens", type=positive, default=256, metavar="N")
    chat.add_argument(
        "--temperature", type=not_negative, default=0.0, metavar="T", help="0 (default): most likely"
    )
    chat.add_argument("--load-in-4bit", action="store_true")


def _add_modules(commands: Any) -> None:
    """The commands whose arguments stand in modules of their own, in the order of the help."""
    from pronghorn.cli import (
        compare,
        compare_adapters,
        curves,
        data,
        embed,
        export,
        lr_find,
        plan,
        quantise,
        run,
        search,
        serve,
        speech,
        stress,
    )

    for module in (plan, lr_find, search, data, export, quantise, serve, compare_adapters):
        module.register(commands)
    for module in (run, curves, compare, stress, speech, embed):
        module.register(commands)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor", help="versions and hardware, then run every kernel and a training step on this machine"
    )
    doctor.add_argument("--json", action="store_true", help="print all of it as one JSON object")
    doctor.add_argument("--facts", action="store_true", help="versions, hardware and paths only; run nothing")
    doctor.add_argument("--fix-hints", action="store_true", help="say what helps, for each check that failed")


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser("explain", help="what an error means: its code, or the text of any error")
    explain.add_argument("words", nargs="*", metavar="CODE_OR_TEXT", help="none: list all codes")
    explain.add_argument("--lang", choices=("en", "zh"), help="default: as the terminal's language")


def _commands() -> dict[str, Callable[[argparse.Namespace], int]]:
    def train(options: argparse.Namespace) -> int:
        from pronghorn.cli.train import run

        return run(options.config, options.overrides, resume=options.resume, as_json=options.json)

    def quickstart(options: argparse.Namespace) -> int:
        from pronghorn.cli.quickstart import run

        return run(options.out, options.steps)

    def doctor(options: argparse.Namespace) -> int:
        from pronghorn.cli.doctor import run

        return run(as_json=options.json, facts_only=options.facts, hints=options.fix_hints)

    def explain(options: argparse.Namespace) -> int:
        from pronghorn.cli.explain import run

        return run(options.words, options.lang)

    others = {name: partial(_run_module, name) for name in _MODULES}
    return {"train": train, "quickstart": quickstart, "doctor": doctor, "explain": explain, **others}


def _run_module(command: str, options: argparse.Namespace) -> int:
    with collector_paused():
        module = import_module(f"pronghorn.cli.{command.replace('-', '_')}")
    return int(module.run(options))
