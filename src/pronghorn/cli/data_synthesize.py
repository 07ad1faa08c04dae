"""``pronghorn data synthesize``: question and answer rows out of documents, written by a local model."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from pronghorn.cli.console import duration, say, table
from pronghorn.cli.numbers import not_negative, positive, whole

if TYPE_CHECKING:
    from pronghorn.data.synthesis.run import SynthesisResult


def register(commands: Any) -> None:
    """Add ``synthesize`` to the subcommands of ``pronghorn data``."""
    parser = commands.add_parser(
        "synthesize",
        help="make question and answer rows out of documents with a local model",
        description="A run that was interrupted goes on with the same command. The rows name the document they are of; "
        "read some of them before you train on them.",
    )
    parser.add_argument(
        "documents", nargs="+", metavar="DOC", help=".txt, .md, .html, .pdf, .docx, or a folder of them"
    )
    parser.add_argument(
        "--model", required=True, metavar="M", help="a folder, a .gguf file or a hub id: a chat model"
    )
    parser.add_argument("--out", required=True, metavar="ROWS.jsonl")
    parser.add_argument(
        "--pairs-per-chunk", type=positive, default=3, metavar="N", help="questions asked (default 3)"
    )
    parser.add_argument(
        "--chunk-tokens", type=positive, default=400, metavar="N", help="of a chunk (default 400)"
    )
    parser.add_argument(
        "--overlap-tokens", type=whole, default=40, metavar="N", help="of two chunks (default 40)"
    )
    parser.add_argument(
        "--answer-tokens", type=positive, default=160, metavar="N", help="at most (default 160)"
    )
    parser.add_argument(
        "--temperature", type=not_negative, default=0.3, metavar="T", help="of questions (default 0.3)"
    )
    parser.add_argument(
        "--batch", type=positive, default=8, metavar="N", help="prompts answered at once (default 8)"
    )
    parser.add_argument("--seed", type=whole, default=3407, metavar="N")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever is finished")
    parser.add_argument("--overwrite", action="store_true", help="replace ROWS.jsonl where it exists")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON: counts and reasons")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the rows; 0 with rows, 1 with none."""
    from pronghorn.cli.models import resolve_model
    from pronghorn.cli.quiet import quiet_libraries

    quiet_libraries()
    from pronghorn.data.synthesis.run import Synthesis
    from pronghorn.inference.synthesis import synthesize

    began = time.perf_counter()
    try:
        result = synthesize(
            options.documents,
            resolve_model(options.model),
            options.out,
            settings=Synthesis(
                pairs_per_chunk=options.pairs_per_chunk,
                chunk_tokens=options.chunk_tokens,
                overlap_tokens=options.overlap_tokens,
                answer_tokens=options.answer_tokens,
                temperature=options.temperature,
                batch=options.batch,
                seed=options.seed,
                model=options.model,
            ),
            restart=options.restart,
            overwrite=options.overwrite,
            progress=_show_progress,
            load_in_4bit=options.load_in_4bit,
        )
    except KeyboardInterrupt:
        print(
            f"\nwhat is finished is kept beside {options.out}: the same command goes on from there",
            file=sys.stderr,
        )
        raise
    if options.json:
        say(json.dumps({**result.as_dict(), "seconds": round(time.perf_counter() - began, 1)}))
    else:
        _show(result, time.perf_counter() - began)
    return 0 if result.rows else 1


def _show_progress(done: int, groups: int, rows: int) -> None:
    end = "\r" if sys.stderr.isatty() and done < groups else "\n"
    print(f"{done} of {groups} groups of chunks, {rows} rows", end=end, file=sys.stderr, flush=True)


def _show(result: SynthesisResult, seconds: float) -> None:
    rows = [
        ("documents", f"{result.documents:,}"),
        ("chunks", f"{result.chunks:,}"),
        ("rows", f"{result.rows:,} in {duration(seconds)}: {result.output}"),
    ]
    if result.resumed:
        rows.append(("gone on after", f"{result.resumed:,} groups that were finished"))
    rows += [(f"left out: {reason}", f"{count:,}") for reason, count in result.rejected.most_common()]
    table("Synthesised", ("what", "count"), rows)
    if result.rows:
        say(f"\nLook at some: pronghorn data preview {result.output} --tokenizer MODEL --rows 5")
