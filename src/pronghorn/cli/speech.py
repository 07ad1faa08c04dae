"""``pronghorn speech train | generate | rows | export | convert``: models that speak in a codec's codes."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from pronghorn.cli.arguments import add_model
from pronghorn.cli.console import duration, say, table
from pronghorn.cli.folders import output_folder
from pronghorn.cli.numbers import not_negative, positive, whole
from pronghorn.errors import CommandMisused


def register(commands: Any) -> None:
    """Add ``speech`` and its subcommands to the parser's commands."""
    speech = commands.add_parser("speech", help="train and use speech models: Fish-Speech, Orpheus")
    parts = speech.add_subparsers(dest="part", required=True, metavar="PART")
    _register_train(parts)
    _register_generate(parts)
    _register_rows(parts)
    export = parts.add_parser(
        "export", help="write a Fish-Speech model with its adapter merged, as published"
    )
    add_model(export)
    export.add_argument("--out", required=True, metavar="DIR")
    export.set_defaults(run=run_export)
    convert = parts.add_parser(
        "convert",
        help="write a folder's model.pth as model.safetensors",
        description="Reads tensors alone: no code in the file runs. The .pth file stays where it is.",
    )
    convert.add_argument("folder", metavar="DIR")
    convert.set_defaults(run=run_convert)


def _register_train(parts: Any) -> None:
    train = parts.add_parser(
        "train",
        help="train an adapter of a Fish-Speech model on texts and codes",
        description='Rows are {"text": ..., "codes": [[...], ...] or "FILE.npy"}; see docs/speech.md.',
    )
    add_model(train)
    train.add_argument("rows", metavar="ROWS", help="a .jsonl file; .npy files are looked for beside it")
    train.add_argument("--out", default="outputs/speech", metavar="DIR")
    train.add_argument("--steps", type=positive, metavar="N", help="instead of --epochs")
    train.add_argument("--epochs", type=positive, default=3, metavar="N", help="default 3")
    train.add_argument(
        "--learning-rate", type=not_negative, default=2e-4, metavar="RATE", help="default 2e-4"
    )
    train.add_argument(
        "--batch-size", type=positive, default=2, metavar="N", help="rows at a time (default 2)"
    )
    train.add_argument("--accumulate", type=positive, default=4, metavar="N", help="times a step (default 4)")
    train.add_argument("--rank", type=positive, default=16, metavar="N", help="of the adapter (default 16)")
    train.add_argument(
        "--half", choices=("both", "slow", "fast"), default="both", help="which transformer is adapted"
    )
    train.add_argument(
        "--code-weight", type=not_negative, default=1.0, metavar="W", help="of the codes' loss (default 1)"
    )
    train.add_argument("--held-back", type=whole, default=0, metavar="N", help="rows to evaluate on")
    train.add_argument("--load-in-4bit", action="store_true", help="the model's projections in NF4 (QLoRA)")
    train.add_argument(
        "--low-memory", action="store_true", help="keep layers' inputs only, and compute them again"
    )
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    train.add_argument("--seed", type=whole, default=3407, metavar="N")
    train.add_argument("--json", action="store_true", help="end with one line of JSON: losses, time, paths")
    train.set_defaults(run=run_train)


def _register_generate(parts: Any) -> None:
    generate = parts.add_parser("generate", help="codes of a text, for the codec to make sound of")
    add_model(generate)
    generate.add_argument("--text", required=True)
    generate.add_argument("--out", required=True, metavar="FILE.npy", help="the codes [codebooks, frames]")
    generate.add_argument("--voice", metavar="NAME", help="of an Orpheus model")
    generate.add_argument("--reference-text", metavar="TEXT", help="what is said in --reference-codes")
    generate.add_argument("--reference-codes", metavar="FILE.npy", help="a voice to speak in (Fish-Speech)")
    generate.add_argument("--max-frames", type=positive, default=1024, metavar="N", help="default 1024")
    generate.add_argument("--temperature", type=not_negative, default=0.7, metavar="T", help="0: most likely")
    generate.add_argument("--top-p", type=float, default=0.8, metavar="P")
    generate.add_argument("--repetition-penalty", type=float, default=1.1, metavar="X")
    generate.add_argument("--seed", type=whole, default=0, metavar="N")
    generate.add_argument("--json", action="store_true", help="end with one line of JSON")
    generate.set_defaults(run=run_generate)


def _register_rows(parts: Any) -> None:
    rows = parts.add_parser(
        "rows",
        help="check rows of texts and codes; for Orpheus write them as token rows",
        description="For an Orpheus model the file that is written is one for `pronghorn train`.",
    )
    add_model(rows)
    rows.add_argument("rows", metavar="ROWS", help="a .jsonl file")
    rows.add_argument("--out", metavar="FILE.jsonl", help="of an Orpheus model: write token rows")
    rows.add_argument(
        "--train-on-prompt", action="store_true", help="of an Orpheus model: learn the text, too"
    )
    rows.add_argument("--json", action="store_true", help="print the figures as JSON")
    rows.set_defaults(run=run_rows)


def run(options: argparse.Namespace) -> int:
    """Run the chosen part."""
    from pronghorn.cli.quiet import quiet_libraries

    quiet_libraries()
    return int(options.run(options))


def run_train(options: argparse.Namespace) -> int:
    """Train, save the adapter, and print what became of it."""
    output_folder(options.out, "--out")
    from pronghorn.speech import SpeechConfig, SpeechRows, SpeechTrainer, add_speech_adapter, load_speech
    from pronghorn.speech.rows import frames_of, read_rows
    from pronghorn.training.checkpoints import newest_checkpoint

    checkpoint = str(newest_checkpoint(options.out)) if options.resume else None
    model, tokenizer = load_speech(options.model, load_in_4bit=options.load_in_4bit)
    maker = SpeechRows(model.config, tokenizer, Path(options.rows).parent)
    rows = read_rows(options.rows, maker.row)
    if options.held_back >= len(rows):
        raise CommandMisused(
            f"{options.held_back} rows are to be held back of only {len(rows)}", fix="hold back fewer"
        )
    held, rows = rows[: options.held_back], rows[options.held_back :]
    say(f"{len(rows)} rows, {frames_of(rows, tokenizer.semantic):,} frames to learn")
    if not hasattr(model, "peft_config"):
        model = add_speech_adapter(model, r=options.rank, lora_alpha=options.rank, half=options.half)
    settings = SpeechConfig(
        output_dir=options.out,
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        gradient_checkpointing=options.low_memory,
        code_weight=options.code_weight,
        seed=options.seed,
        eval_strategy="epoch" if held and not options.steps else "no",
        save_total_limit=2,
        disable_tqdm=False,
    )
    trainer = SpeechTrainer(model, settings, tokenizer, rows, held or None)
    started = time.monotonic()
    steps = trainer.train(resume_from_checkpoint=checkpoint).global_step
    summary = {"steps": steps, "seconds": round(time.monotonic() - started, 2), "train_rows": len(rows)}
    _finish(trainer, summary, Path(options.out) / "adapter", evaluated=bool(held), as_json=options.json)
    return 0


def _finish(trainer: Any, summary: dict[str, Any], adapter: Path, *, evaluated: bool, as_json: bool) -> None:
    """Save the adapter, and print what became of the run."""
    trainer.save_model(str(adapter))
    last: dict[str, Any] = next((e for e in reversed(trainer.state.log_history) if "token_loss" in e), {})
    summary |= {name: last.get(name) for name in ("loss", "token_loss", "code_loss", "code_accuracy")}
    if evaluated:
        summary |= {name: value for name, value in trainer.evaluate().items() if name.endswith("loss")}
    summary["adapter"] = str(adapter)
    shown = [(name, f"{value:.4f}" if isinstance(value, float) else value) for name, value in summary.items()]
    table("Trained", ("what", "value"), [row for row in shown if row[0] != "seconds" and row[1] is not None])
    say(f"in {duration(summary['seconds'])}")
    if as_json:
        say(json.dumps(summary))


def run_generate(options: argparse.Namespace) -> int:
    """Write the codes of a text."""
    if (options.reference_text is None) != (options.reference_codes is None):
        raise CommandMisused(
            "a reference is a text and its codes",
            fix="give --reference-text and --reference-codes, or neither",
        )
    from pronghorn.speech import Sampling
    from pronghorn.speech.checkpoint import is_fish_speech

    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    started = time.monotonic()
    codes = (_fish_codes if is_fish_speech(options.model) else _orpheus_frames)(options, sampling)
    path = _save_codes(Path(options.out), codes)
    found = {"codebooks": codes.shape[0], "frames": codes.shape[1], "codes": str(path)}
    say(
        f"{path}: {codes.shape[1]} frames of {codes.shape[0]} codes, in {duration(time.monotonic() - started)}"
    )
    if options.json:
        say(json.dumps(found))
    return 0


def _fish_codes(options: argparse.Namespace, sampling: Any) -> Any:
    from pronghorn.speech import Reference, SpeechRows, generate_codes, load_speech

    if options.voice is not None:
        raise CommandMisused("--voice is for Orpheus", fix="give --reference-text and --reference-codes")
    model, tokenizer = load_speech(options.model)
    reference = None
    if options.reference_text is not None:
        codes = SpeechRows(model.config, tokenizer).codes(options.reference_codes)
        reference = Reference(options.reference_text, codes)
    return generate_codes(
        model, tokenizer, options.text, reference=reference, max_frames=options.max_frames, sampling=sampling
    )


def _orpheus_frames(options: argparse.Namespace, sampling: Any) -> Any:
    from pronghorn import FastLanguageModel
    from pronghorn.speech import generate_frames

    if options.reference_text is not None:
        raise CommandMisused("references are for Fish-Speech", fix="name a voice with --voice")
    model, tokenizer = FastLanguageModel.from_pretrained(options.model, load_in_4bit=False)
    return generate_frames(
        model,
        tokenizer,
        options.text,
        voice=options.voice,
        max_frames=options.max_frames,
        sampling=sampling,
    )


def run_rows(options: argparse.Namespace) -> int:
    """Check rows, and print how many and how long they are."""
    import numpy as np

    from pronghorn.speech.checkpoint import is_fish_speech

    rows = _fish_rows(options) if is_fish_speech(options.model) else _orpheus_rows(options)
    lengths = np.array([len(row["input_ids"]) for row in rows])
    found = {
        "rows": len(rows),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "median": int(np.median(lengths)),
    }
    if options.json:
        say(json.dumps(found))
    else:
        table("Rows", ("what", "value"), [(name, f"{value:,}") for name, value in found.items()])
    return 0


def _fish_rows(options: argparse.Namespace) -> list[Any]:
    from pronghorn.speech import SpeechRows
    from pronghorn.speech.checkpoint import read_layout
    from pronghorn.speech.rows import read_rows

    if options.out or options.train_on_prompt:
        raise CommandMisused(
            "--out and --train-on-prompt are for Orpheus",
            fix="`pronghorn speech train` reads the rows as they are",
        )
    config, tokenizer = read_layout(options.model)
    return read_rows(options.rows, SpeechRows(config, tokenizer, Path(options.rows).parent).row)


def _orpheus_rows(options: argparse.Namespace) -> list[Any]:
    from pronghorn.cli.tokenizers import tokenizer_named
    from pronghorn.pages.document import write_whole
    from pronghorn.speech import OrpheusLayout
    from pronghorn.speech.rows import read_rows

    tokenizer = tokenizer_named(options.model)
    layout, folder = OrpheusLayout.of(tokenizer), Path(options.rows).parent

    def make(given: dict[str, Any]) -> dict[str, list[int]]:
        return layout.row(tokenizer, given, folder=folder, train_on_prompt=options.train_on_prompt)

    rows = read_rows(options.rows, make)
    if options.out:
        write_whole("".join(json.dumps(row) + "\n" for row in rows), Path(options.out))
        say(f"{options.out}: token rows for `pronghorn train`")
    return rows


def run_export(options: argparse.Namespace) -> int:
    """Write the model with its adapter merged."""
    from pronghorn.speech import load_speech, save_speech

    model, tokenizer = load_speech(options.model, device="cpu")
    say(f"{save_speech(model, tokenizer, options.out)}: the model in the layout it was published in")
    return 0


def run_convert(options: argparse.Namespace) -> int:
    """Write safetensors beside a pickle."""
    from pronghorn.speech import convert_pickle

    say(f"{convert_pickle(options.folder)}: written; model.pth is not needed any more")
    return 0


def _save_codes(path: Path, codes: Any) -> Path:
    import numpy as np

    from pronghorn.export.folder import write_beside

    path = path if path.suffix == ".npy" else path.with_name(f"{path.name}.npy")
    output_folder(str(path.parent), "--out")
    write_beside(path.parent, codes.nbytes, lambda folder: np.save(folder / path.name, codes))
    return path
