"""``pronghorn data preview``: rows as the model sees them, with the tokens that are trained on in colour."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pronghorn.cli.console import is_terminal, say
from pronghorn.cli.numbers import positive
from pronghorn.errors import CommandMisused, PronghornError, RowsUnreadable

if TYPE_CHECKING:
    from pronghorn.data.preview import RowPreview, Run
    from pronghorn.data.reading import Record

#: Around what is trained on, and around what truncation cuts off, where there are no colours.
_TRAINED, _CUT = ("⟦", "⟧"), ("⟨cut: ", "⟩")


def register(commands: Any) -> None:
    """Add ``preview`` to the subcommands of ``pronghorn data``."""
    preview = commands.add_parser(
        "preview", help="rows as the model sees them, and which tokens are trained on"
    )
    preview.add_argument("file", metavar="FILE", help=".jsonl, .json, .csv, .tsv, .parquet or .txt")
    preview.add_argument(
        "--tokenizer", required=True, metavar="MODEL", help="a folder, a .gguf file or a hub id"
    )
    preview.add_argument(
        "--row", type=positive, default=1, metavar="N", help="the row to show, from 1 (default 1)"
    )
    preview.add_argument("--rows", type=positive, default=1, metavar="K", help="how many rows (default 1)")
    preview.add_argument(
        "--template", metavar="NAME", help="a chat template such as chatml, or a .jinja file"
    )
    preview.add_argument(
        "--max-seq-length", type=positive, metavar="N", help="tokens that training keeps of a row"
    )
    preview.add_argument("--all-tokens", action="store_true", help="train on all tokens, not on answers only")
    preview.add_argument(
        "--text-field", default="text", metavar="COLUMN", help="column of plain text (default text)"
    )
    preview.add_argument(
        "--encoding", metavar="NAME", help="of text files that are not UTF-8, such as cp1252"
    )
    preview.add_argument(
        "--json", action="store_true", help="one JSON object a row: ids, tokens, labels, checks"
    )
    preview.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the rows; 0, also where a check warns.

    Raises:
        CommandMisused: no such file, or fewer rows than asked for.
        PronghornError: a row that cannot be rendered, with its line.
    """
    from pronghorn.cli.quiet import quiet_libraries
    from pronghorn.data.reading import RowFile

    file = RowFile(options.file, options.encoding)
    records = list(_wanted(file, options.row, options.rows))
    quiet_libraries()
    from pronghorn.cli.tokenizers import tokenizer_named
    from pronghorn.data.chat_templates import get_chat_template
    from pronghorn.data.preview import preview_row

    tokenizer = tokenizer_named(options.tokenizer)
    if options.template:
        get_chat_template(tokenizer, _template(options.template))
    for record in records:
        try:
            shown = preview_row(
                _value(record),
                tokenizer,
                max_length=options.max_seq_length,
                responses_only=not options.all_tokens,
                text_field=options.text_field,
            )
        except PronghornError as error:
            place = record.place(options.file)
            error.where = f"{place}; {error.where}" if error.where else place
            if "chat template" in error.message and not options.template:
                error.fix += ("; " if error.fix else "") + "or try one: --template chatml"
            raise
        if options.json:
            say(json.dumps({"file": options.file, "row": record.row, "line": record.line, **shown.as_dict()}))
        else:
            _show(shown, record.place(options.file))
    return 0


def _wanted(file: Any, first: int, count: int) -> Iterator[Record]:
    last, end = 0, first + count
    for record in file.records():
        last = record.row
        if last >= end:
            return
        if last >= first and (record.value is not None or record.problem):
            yield record
    if last < first:
        told = f": {file.told[0][1].what}" if file.told else ""
        raise CommandMisused(
            f"there is no row {first}: '{file.name}' has {last}{told}",
            fix=f"give --row from 1 to {last}" if last else "",
        )


def _value(record: Record) -> dict[str, Any]:
    if record.problem is not None or not isinstance(record.value, dict):
        what = record.problem.what if record.problem else "the row is no object with columns"
        raise RowsUnreadable(
            what, fix="pronghorn data check names all such rows, pronghorn data clean repairs many"
        )
    return record.value


def _template(name: str) -> str:
    """A name, or the text in a .jinja file."""
    path = Path(name).expanduser()
    return path.read_text(encoding="utf-8") if path.suffix in (".jinja", ".j2") and path.is_file() else name


def _show(shown: RowPreview, place: str) -> None:
    trained = f"{shown.supervised} trained on ({shown.supervised / max(shown.kept, 1):.0%})"
    title = f"{place}: {shown.kind.replace('_', '/')}, {len(shown.ids)} tokens, {trained}"
    if is_terminal():
        _show_colours(shown, title)
    else:
        say(f"== {title}")
        say(
            f"   {_TRAINED[0]}trained on{_TRAINED[1]}"
            + (f", {_CUT[0]}…{_CUT[1]} is lost" if shown.kept < len(shown.ids) else "")
        )
        say(_plain(shown.runs))
        for check in shown.checks:
            say(f"   {check.level}: {check.text}")
        say()


def _plain(runs: list[Run]) -> str:
    """The text with marks around what is trained on and what is cut off."""
    parts: list[str] = []
    trained = cut = False
    for run_ in [*runs, None]:
        now_trained, now_cut = (run_.supervised, run_.cut) if run_ else (False, False)
        if trained and (not now_trained or now_cut != cut):
            parts.append(_TRAINED[1])
            trained = False
        if cut and not now_cut:
            parts.append(_CUT[1])
        if now_cut and not cut:
            parts.append(_CUT[0])
        if now_trained and not trained:
            parts.append(_TRAINED[0])
        trained, cut = now_trained, now_cut
        if run_:
            parts.append(run_.text)
    return "".join(parts)


def _show_colours(shown: RowPreview, title: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.rule(Text(title, style="bold"), align="left")
    legend = Text("trained on", style="black on green") + Text("  not trained on") + Text("  ")
    legend += Text("special token", style="bold magenta") + Text("  ") + Text("cut off", style="dim strike")
    console.print(legend)
    text = Text()
    for run_ in shown.runs:
        visible = run_.text.replace("\n", "↵\n").replace("\t", "→\t")
        style = "black on green" if run_.supervised else ""
        if run_.special:
            style = "bold magenta on green" if run_.supervised else "bold magenta"
        text.append(visible, style="dim strike" if run_.cut else style)
    console.print(text)
    for check in shown.checks:
        mark = Text("✓ ", style="green") if check.level == "ok" else Text("! ", style="bold yellow")
        console.print(mark + Text(check.text))
