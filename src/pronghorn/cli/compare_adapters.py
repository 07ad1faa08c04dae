"""``pronghorn compare-adapters MODEL``: what a model and its adapters answer, side by side, and how well."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from typing import TYPE_CHECKING, Any

from pronghorn.cli.arguments import add_adapters, add_model, read_adapters
from pronghorn.cli.console import heading, is_terminal, say, table, wrapped
from pronghorn.cli.numbers import positive
from pronghorn.errors import CommandMisused, RowsUnreadable

if TYPE_CHECKING:
    from pronghorn.inference.compare import Asked, Compared

PROMPTS = (
    "What is the fastest land animal of North America?",
    "Write a Python function that returns the mean of a list of numbers.",
    "Explain in one sentence why the sky is blue.",
)


def register(commands: Any) -> None:
    """Add ``compare-adapters`` to the parser's commands."""
    parser = commands.add_parser(
        "compare-adapters",
        help="answers of a model and its adapters side by side, and scores on held-out rows",
        description="All of them answer greedily, in one batch over one copy of the weights. With --data, answers are "
        "scored against the rows' own: loss and perplexity of the rows' answers, exact match, and F1 of words.",
    )
    add_model(parser)
    add_adapters(parser)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--prompts", metavar="FILE", help="a .txt file of a question a line, or rows of messages or prompts"
    )
    asked.add_argument(
        "--data", metavar="FILE", help="rows with questions and answers, as training reads them"
    )
    parser.add_argument(
        "--rows",
        type=positive,
        default=32,
        metavar="N",
        help="how many of the file, from its beginning (default 32)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="of an answer (default 128)"
    )
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--json", action="store_true", help="print all of it as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Ask, score and print; 0.

    Raises:
        CommandMisused: there is nothing to compare, or nothing to ask.
        PronghornError: what is wrong with a model, an adapter or a row.
    """
    adapters = read_adapters(options.adapters)
    rows = read_rows(options.data or options.prompts, options.rows) if options.data or options.prompts else []
    compared, names = _compare(options, adapters, rows)
    if options.json:
        print(
            json.dumps({"model": options.model, "variants": names, **compared.as_dict()}, ensure_ascii=False)
        )
        return 0
    for asked in compared.asked:
        _show(asked)
    if compared.scores:
        _show_scores(compared)
    return 0


def _compare(
    options: argparse.Namespace, adapters: dict[str, str], rows: list[dict[str, Any]]
) -> tuple[Compared, list[str]]:
    from pronghorn.cli.models import resolve_model
    from pronghorn.cli.quiet import quiet_libraries

    conversations = [conversation_of(row) for row in rows] if options.prompts else []
    quiet_libraries()
    from pronghorn.inference.compare import compare_prompts, compare_rows
    from pronghorn.inference.variants import load_variants

    model, variants = load_variants(resolve_model(options.model), adapters, load_in_4bit=options.load_in_4bit)
    if len(variants) < 2:
        raise CommandMisused("there is nothing to compare with", fix="name an adapter: --adapter NAME=PATH")
    names = [variant.name for variant in variants]
    if options.data:
        found = compare_rows(model, variants, rows, max_new_tokens=options.max_new_tokens)
        return found, names
    asked = conversations or [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return compare_prompts(model, variants, asked, max_new_tokens=options.max_new_tokens), names


def read_rows(path: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a file.

    Raises:
        CommandMisused: there is no such file.
        RowsUnreadable: it has no rows, or a broken one among them.
    """
    from pronghorn.data.reading import RowFile

    rows = []
    for record in islice(RowFile(path).records(), count):
        if record.problem is not None or not isinstance(record.value, dict):
            what = record.problem.what if record.problem else "the row is no object with columns"
            raise RowsUnreadable(what, where=f"{path}, row {record.row}", fix=f"pronghorn data check {path}")
        rows.append(record.value)
    if not rows:
        raise RowsUnreadable("the file has no rows", where=path, fix="name another")
    return rows


def conversation_of(row: dict[str, Any]) -> list[dict[str, str]]:
    """A row's messages up to its last question; a prompt, an instruction or a line of text is one question."""
    from pronghorn.data.rows import as_message, messages_of

    prompt = row.get("prompt")
    messages = messages_of(row) or ([as_message(m) for m in prompt] if isinstance(prompt, list) else None)
    if messages:
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        messages = messages[: last + 1]
    else:
        text = next((row[n] for n in ("prompt", "text", "instruction") if isinstance(row.get(n), str)), "")
        given = row.get("input") if "instruction" in row else None
        text = f"{text}\n\n{given}" if given else text
        messages = [{"role": "user", "content": text}] if text.strip() else []
    if not messages:
        raise RowsUnreadable(
            "a row has no question",
            where=", ".join(row),
            fix='give "prompt", "text" or "messages" with a user\'s turn',
        )
    return messages


def _show(asked: Asked) -> None:
    heading(_short(asked.question))
    reference = {} if asked.reference is None else {"(the row)": asked.reference}
    answers = {**asked.answers, **reference}
    if is_terminal():
        table("", list(answers), [list(answers.values())])
        return
    for name, answer in answers.items():
        say(f"{name}:")
        say(wrapped(answer, "  ") or "  (nothing)")


def _show_scores(compared: Compared) -> None:
    rows = [
        [
            name,
            f"{score.loss:.4f}",
            f"{score.perplexity:,.2f}",
            f"{score.exact_match:.1%}",
            f"{score.token_f1:.3f}",
        ]
        for name, score in compared.scores.items()
    ]
    some = next(iter(compared.scores.values()))
    title = f"held-out rows: {some.rows}, tokens of their answers: {some.tokens:,}"
    table(title, ["model", "loss", "perplexity", "exact match", "word F1"], rows)


def _short(text: str, length: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
