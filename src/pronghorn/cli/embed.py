"""``pronghorn embed train`` and ``pronghorn embed encode``: embedding models trained on pairs, and texts as vectors."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from pronghorn.cli.console import duration, say, table
from pronghorn.cli.folders import output_folder
from pronghorn.cli.numbers import not_negative, positive, whole
from pronghorn.errors import CommandMisused

OUTPUTS = (".npy", ".safetensors")


def register(commands: Any) -> None:
    """Add ``embed`` to the parser's commands."""
    parser = commands.add_parser(
        "embed", help="train an embedding model on pairs of texts, or turn texts into vectors"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _register_train(actions)
    _register_encode(actions)


def _register_train(actions: Any) -> None:
    train = actions.add_parser("train", help="train an adapter on rows of pairs")
    _add_model(train)
    train.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="FILE",
        help="rows with anchor and positive (negative), query and document, or sentence1, sentence2 and score; "
        "'docstrings' is Python's own library (repeatable)",
    )
    train.add_argument("--out", default="outputs/embedding", metavar="DIR")
    train.add_argument("--held-back", type=whole, default=0, metavar="N", help="rows kept for the evaluation")
    train.add_argument("--steps", type=positive, metavar="N", help="training steps (default: by epochs)")
    train.add_argument("--epochs", type=not_negative, default=1.0, metavar="N")
    train.add_argument(
        "--batch", type=positive, default=64, metavar="ROWS", help="rows of a batch (default 64)"
    )
    train.add_argument(
        "--texts-at-a-time",
        type=positive,
        metavar="N",
        help="run a batch in parts of N texts: the same gradient in the memory of one part",
    )
    train.add_argument("--learning-rate", type=not_negative, default=2e-4, metavar="RATE")
    train.add_argument("--rank", type=positive, default=16, metavar="R")
    train.add_argument(
        "--loss", default="auto", help="info_nce, triplet, cosent, cosine (default: by the rows)"
    )
    train.add_argument("--scale", type=float, default=20.0, metavar="S", help="1 / temperature (default 20)")
    train.add_argument("--symmetric", action="store_true", help="documents are to find their queries, too")
    train.add_argument("--dims", metavar="N,N", help="train vectors of these lengths, too (Matryoshka)")
    train.add_argument("--query-prompt", metavar="TEXT", help="put in front of anchors")
    train.add_argument("--document-prompt", metavar="TEXT", help="put in front of the other texts")
    train.add_argument("--seed", type=whole, default=3407, metavar="N")
    train.add_argument(
        "--merged", action="store_true", help="also write the model with the adapter merged in"
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the output folder"
    )
    train.add_argument("--json", action="store_true", help="end with one line of JSON: figures, time, paths")


def _register_encode(actions: Any) -> None:
    encode = actions.add_parser("encode", help="turn the texts of a file into vectors")
    _add_model(encode)
    encode.add_argument(
        "--input", required=True, metavar="FILE", help=".txt (a text a line), .jsonl, .csv or .parquet"
    )
    encode.add_argument(
        "--output", required=True, metavar="FILE", help="[n, H] in fp32: .npy or .safetensors"
    )
    encode.add_argument(
        "--field", default="text", metavar="NAME", help="the column with the text (default text)"
    )
    encode.add_argument("--prompt-name", metavar="NAME", help="one of the model's prompts, such as query")
    encode.add_argument("--prompt", metavar="TEXT", help="a text to put in front of each")
    encode.add_argument("--dim", type=positive, metavar="N", help="keep the first N elements")
    encode.add_argument("--json", action="store_true", help="end with one line of JSON: shape, time, path")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="MODEL", help="a folder, a .gguf file or a hub id")
    command.add_argument("--max-seq-length", type=positive, metavar="N", help="cut texts to N tokens")
    command.add_argument(
        "--pooling", default="auto", help="auto (what the model's folder says), mean, cls or last"
    )
    command.add_argument("--load-in-4bit", action="store_true", help="store frozen weights in 4 bits")
    command.add_argument(
        "--load-in-int8", action="store_true", help="multiply frozen weights as 8-bit integers"
    )


def run(options: argparse.Namespace) -> int:
    """Train or encode; 0 when done."""
    from pronghorn.cli.quiet import quiet_libraries

    quiet_libraries()
    return _train(options) if options.action == "train" else _encode(options)


def _load(options: argparse.Namespace) -> Any:
    from pronghorn import FastEmbeddingModel
    from pronghorn.cli.models import resolve_model

    model, _ = FastEmbeddingModel.from_pretrained(
        resolve_model(options.model),
        max_seq_length=options.max_seq_length,
        pooling=options.pooling,
        load_in_4bit=options.load_in_4bit,
        load_in_int8=options.load_in_int8,
    )
    return model


# --- train -----------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    from pronghorn.embedding import EmbeddingTrainer
    from pronghorn.embedding.rows import hold_back, read_pairs

    out = output_folder(options.out, "--out")
    settings = _settings(options, out)
    pairs = read_pairs(options.data)
    rows, held = hold_back(pairs, options.held_back, options.seed)
    model = _adapted(_load(options), options)
    trainer = EmbeddingTrainer(model, settings, rows, held or None)
    say(f"{len(rows):,} rows to train on, {len(held):,} held back; loss {trainer.objective.name}")
    before = trainer.evaluate() if held else {}
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=options.resume or None)
    seconds = time.perf_counter() - started
    after = trainer.evaluate() if held else {}
    saved = {"adapter": str(model.save_embedding_adapter(out / "adapter"))}
    if options.merged:
        saved["merged"] = str(model.save_pretrained_merged(out / "merged"))
    if held:
        shown = [[name.removeprefix("eval_"), f"{before[name]:.4f}", f"{after[name]:.4f}"] for name in after]
        table("held-back rows", ["figure", "before", "after"], shown)
    say(f"{result.global_step} steps in {duration(seconds)}")
    for name, path in saved.items():
        say(f"{name}: {path}")
    if options.json:
        figures = {"before": _plain(before), "after": _plain(after), "train_loss": result.training_loss}
        counts = {
            "steps": result.global_step,
            "seconds": round(seconds, 2),
            "rows": len(rows),
            "held_back": len(held),
        }
        print(json.dumps({**counts, **figures, **saved}))
    return 0


def _settings(options: argparse.Namespace, out: Path) -> Any:
    from pronghorn import EmbeddingConfig

    return EmbeddingConfig(
        output_dir=str(out),
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_cache_texts=options.texts_at_a_time,
        learning_rate=options.learning_rate,
        loss=options.loss,
        scale=options.scale,
        symmetric=options.symmetric,
        matryoshka_dims=_dims(options.dims),
        query_prompt=options.query_prompt,
        document_prompt=options.document_prompt,
        seed=options.seed,
        disable_tqdm=False,
        report_to="none",
    )


def _adapted(model: Any, options: argparse.Namespace) -> Any:
    """The model with a new adapter, or with the one it was loaded with."""
    from pronghorn import FastEmbeddingModel

    if hasattr(model, "peft_config"):
        return model
    return FastEmbeddingModel.get_peft_model(
        model, r=options.rank, lora_alpha=2 * options.rank, random_state=options.seed
    )


def _dims(text: str | None) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise CommandMisused(f"--dims {text} are no numbers", fix="write them as 512,256,128") from None


def _plain(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval_"): round(value, 6) for name, value in metrics.items()}


# --- encode ----------------------------------------------------------------------------------------------------


def _encode(options: argparse.Namespace) -> int:
    out = Path(options.output).expanduser()
    if out.suffix not in OUTPUTS:
        raise CommandMisused(
            f"--output {options.output} is of no kind that is written", fix=f"use one of {', '.join(OUTPUTS)}"
        )
    if options.prompt is not None and options.prompt_name is not None:
        raise CommandMisused("--prompt and --prompt-name exclude each other", fix="leave out one of them")
    output_folder(str(out.parent), "--output")
    from pronghorn.embedding.rows import read_texts
    from pronghorn.embedding.saving import write_vectors

    texts = read_texts(options.input, options.field)
    model = _load(options)
    started = time.perf_counter()
    vectors = model.encode(texts, prompt_name=options.prompt_name, prompt=options.prompt, dim=options.dim)
    seconds = time.perf_counter() - started
    write_vectors(out, vectors)
    say(f"{len(texts):,} texts as vectors of {vectors.shape[1]} in {duration(seconds)}: {out}")
    if options.json:
        print(json.dumps({"output": str(out), "shape": list(vectors.shape), "seconds": round(seconds, 2)}))
    return 0
