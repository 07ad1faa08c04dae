"""``pronghorn data check | clean | stats``: is a file of rows fit for training, and what makes it so."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pronghorn.cli import data_preview, data_synthesize
from pronghorn.cli.console import say, table
from pronghorn.cli.numbers import positive, whole
from pronghorn.errors import CommandMisused

if TYPE_CHECKING:
    from pronghorn.data.checks import Report
    from pronghorn.data.cleaning import CleanResult
    from pronghorn.data.lengths import LengthReport

EXIT_PROBLEMS = 1

#: Problems of a kind that are listed in a terminal.
_LISTED = 20


def register(commands: Any) -> None:
    """Add ``data`` and its subcommands to the parser's commands."""
    data = commands.add_parser("data", help="check, clean, measure and show files of rows")
    parts = data.add_subparsers(dest="part", required=True, metavar="PART")
    _register_check(parts)
    _register_clean(parts)
    _register_stats(parts)
    data_preview.register(parts)
    data_synthesize.register(parts)


def _register_check(parts: Any) -> None:
    check = parts.add_parser(
        "check",
        help="what is wrong with files of rows, line by line",
        description="Several files are splits of one data set: rows that two of them share are told, too. "
        "The exit status is 0 without problems, 1 with, 2 for a mistake in the command.",
    )
    check.add_argument("files", nargs="+", metavar="FILE", help=".jsonl, .json, .csv, .tsv, .parquet or .txt")
    check.add_argument(
        "--tokenizer", metavar="MODEL", help="a folder, a .gguf file or a hub id: check tokens, too"
    )
    check.add_argument(
        "--max-seq-length", type=positive, metavar="N", help="tokens that training keeps of a row"
    )
    check.add_argument("--all-tokens", action="store_true", help="train on all tokens, not on answers only")
    check.add_argument(
        "--no-near", action="store_true", help="skip the search for rows that are nearly the same"
    )
    check.add_argument(
        "--limit",
        type=whole,
        metavar="N",
        help="problems listed of each kind (default 20, --json all); 0: all",
    )
    check.add_argument(
        "--fail-on", choices=("error", "warning"), default="warning", help="what makes the status 1"
    )
    check.add_argument("--html", metavar="PATH", help="write a page with histograms and samples")
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_reading(check)
    check.set_defaults(run=run_check)


def _register_clean(parts: Any) -> None:
    clean = parts.add_parser(
        "clean",
        help="repair what has one safe repair, set aside what has none",
        description="Writes JSON Lines to OUT and the rows that cannot be trained on, with the reason, to "
        "OUT.rejected.jsonl beside it. IN is never changed.",
    )
    clean.add_argument("source", metavar="IN")
    clean.add_argument("target", metavar="OUT.jsonl")
    clean.add_argument(
        "--dedup", action="store_true", help="leave out rows that teach the same as an earlier one"
    )
    clean.add_argument("--force", action="store_true", help="replace OUT where it exists")
    clean.add_argument("--json", action="store_true", help="print the counts as JSON")
    _add_reading(clean)
    clean.set_defaults(run=run_clean)


def _register_stats(parts: Any) -> None:
    stats = parts.add_parser("stats", help="lengths in tokens, and the max_seq_length to train with")
    stats.add_argument("files", nargs="+", metavar="FILE")
    stats.add_argument(
        "--tokenizer", required=True, metavar="MODEL", help="a folder, a .gguf file or a hub id"
    )
    stats.add_argument(
        "--max-seq-length", type=positive, metavar="N", help="judge this one (default: advise one)"
    )
    stats.add_argument(
        "--batch", type=positive, default=8, metavar="N", help="rows of a padded batch (default 8)"
    )
    stats.add_argument("--all-tokens", action="store_true", help="train on all tokens, not on answers only")
    stats.add_argument(
        "--workers", type=positive, metavar="N", help="processes (default: one a core, at most 8)"
    )
    stats.add_argument("--json", action="store_true", help="print the figures as JSON")
    _add_reading(stats)
    stats.set_defaults(run=run_stats)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoding", metavar="NAME", help="of text files that are not UTF-8, such as cp1252")
    parser.add_argument(
        "--text-field", default="text", metavar="COLUMN", help="column of plain text (default text)"
    )


def run(options: argparse.Namespace) -> int:
    return int(options.run(options))


def run_check(options: argparse.Namespace) -> int:
    from pronghorn.data.checks import check

    tokenizer = _tokenizer(options.tokenizer) if options.tokenizer else None
    if options.max_seq_length and tokenizer is None:
        raise CommandMisused("--max-seq-length counts tokens", fix="name a --tokenizer, too")
    limit = options.limit if options.limit is not None else (0 if options.json else _LISTED)
    with progress_bar("Checking") as progress:
        report = check(
            options.files,
            tokenizer=tokenizer,
            max_seq_length=options.max_seq_length,
            responses_only=not options.all_tokens,
            near_duplicates=not options.no_near,
            limit=limit or None,
            encoding=options.encoding,
            text_field=options.text_field,
            progress=progress,
        )
    page = report.write_html(options.html) if options.html else None
    if options.json:
        say(json.dumps(report.as_dict(), ensure_ascii=True))
    else:
        _show_checked(report)
        if page is not None:
            say(f"\nPage: {page}")
    failing = report.errors or (options.fail_on == "warning" and report.warnings)
    return EXIT_PROBLEMS if failing else 0


def _show_checked(report: Report) -> None:
    from pronghorn.data.checks.formats import NAMES
    from pronghorn.data.reading import KINDS
    from pronghorn.pages import visible

    rows = [
        (
            visible(file.name, 400),
            file.container + ("" if file.encoding == "utf-8" else f", {file.encoding}"),
            NAMES.get(file.format or "", "unknown"),
            f"{file.rows + file.unread:,}",
            f"{file.bad_rows:,}",
            *([f"{sum(file.tokens):,}"] if report.measured else []),
        )
        for file in report.files
    ]
    table(
        "Files",
        ("file", "kind", "format", "rows", "with errors", *(["tokens"] if report.measured else [])),
        rows,
    )
    if report.counts:
        table(
            "Problems",
            ("kind", "level", "count", "what", "how to fix"),
            [
                (kind, level, f"{count:,}", KINDS[kind].title, KINDS[kind].fix)
                for kind, level, count in report.kinds()
            ],
        )
        say()
    for finding in report.findings:
        field = f" {finding.field}:" if finding.field else ""
        say(f"{visible(finding.place, 400)}: [{finding.kind}]{field} {finding.what}")
    unlisted = sum(report.counts.values()) - len(report.findings)
    if unlisted:
        say(f"... and {unlisted:,} more (--limit 0 lists all)")
    for note in report.notes:
        say(f"Note: {note}")
    say()
    if report.clean:
        say("No problems.")
    else:
        say(f"{_count(report.errors, 'error')}, {_count(report.warnings, 'warning')}.")
        if any(KINDS[kind].repaired for kind in report.counts):
            say("pronghorn data clean IN OUT.jsonl repairs what has one safe repair.")


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" + ("" if number == 1 else "s")


def run_stats(options: argparse.Namespace) -> int:
    from pronghorn.data.lengths import stats

    tokenizer = _tokenizer(options.tokenizer)
    with progress_bar("Measuring") as progress:
        report = stats(
            options.files,
            tokenizer,
            max_seq_length=options.max_seq_length,
            batch=options.batch,
            responses_only=not options.all_tokens,
            text_field=options.text_field,
            encoding=options.encoding,
            workers=options.workers,
            progress=progress,
        )
    if options.json:
        say(json.dumps(report.as_dict()))
    else:
        _show_lengths(report)
    return 0


def _show_lengths(report: LengthReport) -> None:
    from pronghorn.data.reading import KINDS

    size, why = report.advice()
    chosen = report.asked or size
    cut = report.at(chosen)
    total = sum(report.tokens)
    table(
        "Rows",
        ("what", "value"),
        [
            ("rows", f"{len(report.tokens):,}"),
            *(
                (f"left out: {kind}", f"{n:,} ({KINDS[kind].title})")
                for kind, n in report.problems.most_common()
            ),
            ("tokens", f"{total:,} ({total / len(report.tokens):,.1f} a row)"),
            ("trained on", f"{sum(report.supervised):,} ({report.supervised_share:.1%})"),
        ],
    )
    percentiles = report.percentiles()
    table("Tokens of a row", [f"{p} %" for p in percentiles], [[f"{n:,}" for n in percentiles.values()]])
    table(
        f"With max_seq_length {chosen:,}",
        ("what", "value"),
        [
            ("rows cut", f"{cut.rows_cut:,} ({cut.rows_cut / len(report.tokens):.2%})"),
            ("tokens cut off", f"{cut.tokens_lost:,} ({cut.tokens_lost / max(total, 1):.2%})"),
            (f"padding, batches of {report.batch}", f"{cut.padding:.1%}"),
            ("padding, packed", f"{cut.padding_packed:.1%} ({cut.sequences:,} sequences)"),
        ],
    )
    say(f"\nAdvised: max_seq_length {size:,}: {why}.")


def _tokenizer(name: str) -> Any:
    from pronghorn.cli.quiet import quiet_libraries

    quiet_libraries()
    from pronghorn.cli.tokenizers import tokenizer_named

    return tokenizer_named(name)


def run_clean(options: argparse.Namespace) -> int:
    from pronghorn.data.cleaning import clean

    with progress_bar("Cleaning") as progress:
        result = clean(
            options.source,
            options.target,
            dedup=options.dedup,
            force=options.force,
            encoding=options.encoding,
            text_field=options.text_field,
            progress=progress,
        )
    if options.json:
        say(json.dumps(result.as_dict()))
    else:
        _show_cleaned(result)
    return 0 if result.rows_out else EXIT_PROBLEMS


def _show_cleaned(result: CleanResult) -> None:
    from pronghorn.data.checks.formats import NAMES
    from pronghorn.data.reading import KINDS

    named = NAMES.get(result.format or "", "of no known format")
    rows = [
        ("rows read", f"{result.rows_in:,}", named),
        ("rows written", f"{result.rows_out:,}", result.target),
    ]
    if result.duplicates:
        rows.append(("duplicates left out", f"{result.duplicates:,}", "the first of each is kept"))
    if result.blank_lines:
        rows.append(("blank lines left out", f"{result.blank_lines:,}", ""))
    rows += [(f"repaired: {kind}", f"{n:,}", KINDS[kind].title) for kind, n in result.repairs.most_common()]
    rows += [(f"rejected: {kind}", f"{n:,}", KINDS[kind].title) for kind, n in result.rejected.most_common()]
    table("Cleaned", ("what", "count", "note"), rows)
    if result.rejected_file:
        say(f"\nRejected: {result.rows_rejected:,}, each with its line and reason in {result.rejected_file}")
    elif not result.repairs and not result.duplicates and not result.blank_lines:
        say("\nNothing had to be repaired.")


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the error stream while a terminal shows it; it is told (bytes done, in all)."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
