"""``pronghorn export MODEL --to gguf``: a model or adapter as it runs elsewhere, opened again and compared."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from pronghorn.cli.arguments import add_model
from pronghorn.cli.console import duration, say
from pronghorn.errors import CommandMisused, ExportDiffers, PronghornError

FORMS = ("gguf", "gguf_lora", "merged_16bit", "merged_4bit", "fp8", "lora")
DEFAULT_QUANTIZATION = "q8_0"
HELD_OUT_ROWS = 16


def register(commands: Any) -> None:
    """Add ``export`` to the parser's commands."""
    parser = commands.add_parser(
        "export",
        help="write a model or an adapter as GGUF, or as a stock checkpoint, and compare it with the original",
        description="What is written is opened again and must predict what the model predicts. Where it does not, it "
        "is kept with a file beside it that says so, and the exit status is 2.",
    )
    add_model(parser)
    parser.add_argument("--to", required=True, choices=FORMS)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument(
        "--quantization",
        action="append",
        metavar="FORMAT[,FORMAT]",
        help=f"of gguf: f16, bf16, q8_0, q4_0, q4_k_m and others (repeatable; default {DEFAULT_QUANTIZATION})",
    )
    parser.add_argument(
        "--held-out",
        metavar="ROWS",
        help=f"a file of rows or lines: compare on its first {HELD_OUT_ROWS} (default: short texts of our own)",
    )
    parser.add_argument(
        "--load-in-4bit", action="store_true", help="merge into NF4 weights, as QLoRA trained"
    )
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON: files and figures")


def run(options: argparse.Namespace) -> int:
    """Write it; 0 when it is what the model is."""
    if options.quantization and options.to != "gguf":
        raise CommandMisused("--quantization is for --to gguf", fix="leave it out, or use --to gguf")
    if options.held_out and not Path(options.held_out).is_file():
        raise CommandMisused(
            "the file of held-out rows does not exist", where=options.held_out, fix="name another"
        )
    from pronghorn.cli.models import resolve_model
    from pronghorn.cli.quiet import quiet_libraries

    quiet_libraries()
    from pronghorn.loading import FastLanguageModel

    started = time.monotonic()
    model, tokenizer = FastLanguageModel.from_pretrained(
        resolve_model(options.model), max_seq_length=None, load_in_4bit=options.load_in_4bit
    )
    model.eval()
    held_out = read_held_out(Path(options.held_out), tokenizer) if options.held_out else None
    failure = None
    try:
        done = _export(model, tokenizer, options, held_out)
    except ExportDiffers as error:
        failure, done = error, error.export
    for file in done.files:
        say(f"{file} ({file.stat().st_size / 2**20:,.0f} MiB)" if file.is_file() else str(file))
    for found in done.checks:
        say(f"  {found}")
    say(f"done in {duration(time.monotonic() - started)}")
    if options.json:
        print(json.dumps(_report(done)))
    if failure is not None:
        raise failure
    return 0


def _export(model: Any, tokenizer: Any, options: argparse.Namespace, held_out: list[str] | None) -> Any:
    """Raises:
    ExportDiffers: for an export that is not the model; what was written is on it.
    """
    from pronghorn.export import save_gguf, save_gguf_adapter, save_merged

    verify = not options.no_check
    if options.to == "gguf_lora":
        return save_gguf_adapter(model, options.out)
    if options.to != "gguf":
        return save_merged(model, tokenizer, options.out, options.to, verify=verify, held_out=held_out)
    asked = ",".join(options.quantization or [DEFAULT_QUANTIZATION])
    methods = [name.strip() for name in asked.split(",") if name.strip()]
    return save_gguf(model, tokenizer, options.out, methods, verify=verify, held_out=held_out)


def _report(done: Any) -> dict[str, Any]:
    return {
        "files": [str(file) for file in done.files],
        "passed": not done.failed,
        "checks": [
            {
                "name": found.name,
                "passed": found.passed,
                "adapted_weights": found.adapted,
                "comparisons": [asdict(item) for item in found.comparisons],
                "problems": found.problems,
            }
            for found in done.checks
        ],
    }


def read_held_out(path: Path, tokenizer: Any) -> list[str]:
    """Texts of a file's first rows, of any kind that is trained on; what cannot be read is passed over.

    Raises:
        CommandMisused: when there are none, or the file is of no kind that is read.
    """
    from pronghorn.data.reading import RowFile
    from pronghorn.data.rows import RowFormat, RowRenderer

    renderer = RowRenderer(tokenizer, RowFormat())
    rows = (record.value for record in RowFile(path).records() if isinstance(record.value, dict))
    found = [text for row in islice(rows, HELD_OUT_ROWS) if (text := _text_of(row, renderer)).strip()]
    if not found:
        raise CommandMisused(
            "no text to compare on",
            where=str(path),
            fix="use lines of text in UTF-8, or rows as they are trained on (pronghorn data check)",
        )
    return found


def _text_of(row: dict[str, Any], renderer: Any) -> str:
    from pronghorn.data.rows import row_kind

    if row_kind(row) in ("text", None):
        return str(row.get("text") or row.get("prompt") or "")
    try:
        return str(renderer.tokenizer.decode(renderer(row)["input_ids"]))
    except PronghornError:
        return ""
