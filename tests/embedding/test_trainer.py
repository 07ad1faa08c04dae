"""Training: a step's gradient, what is learned, checkpoints, evaluation, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pronghorn.embedding import EmbeddingConfig, EmbeddingTrainer, FastEmbeddingModel, embedder_of
from pronghorn.embedding.layout import Layout, write_layout
from pronghorn.embedding.vectors import forward
from pronghorn.errors import CheckpointMissing, PronghornError, UnknownArgument
from tests.embedding.models import embedder, save_embedder

WORDS = [
    "grass",
    "sage",
    "cactus",
    "river",
    "stone",
    "cloud",
    "horn",
    "hoof",
    "night",
    "snow",
    "dust",
    "wind",
]
PAIRS = [{"anchor": f"what is {word}", "positive": f"{word} {word[::-1]} {word}"} for word in WORDS]
SCORED = [
    {"sentence1": a, "sentence2": b, "score": len({*a} & {*b}) / 3} for a in WORDS[:6] for b in WORDS[6:]
]


def settings(folder: Path, **options: Any) -> EmbeddingConfig:
    given = {
        "max_steps": 1, "per_device_train_batch_size": 6, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "report_to": "none",
    }  # fmt: skip
    return EmbeddingConfig(output_dir=str(folder), **{**given, **options})


def adapter(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", ["qwen2", "bert"])
def test_a_step_in_parts_is_the_step_of_the_batch(tmp_path: Path, kind: str) -> None:
    trained = []
    for texts in (None, 5):
        model = embedder(tmp_path / "base", kind)
        before = adapter(model)
        run = EmbeddingTrainer(model, settings(tmp_path, gradient_cache_texts=texts), PAIRS)
        run.train()
        trained.append(adapter(model) - before)
        assert run.state.log_history[0]["num_tokens"] > 0
    assert trained[0].norm() > 0
    assert float((trained[1] - trained[0]).norm() / trained[0].norm()) < 1e-4


def test_accumulation_is_the_mean_of_batches(tmp_path: Path) -> None:
    model = embedder(tmp_path / "base", "llama")
    run = EmbeddingTrainer(model, settings(tmp_path, gradient_accumulation_steps=2), PAIRS)
    losses = [
        run.objective(forward(model, batch["parts"][0], "last"), batch["facts"]) / 2
        for batch in map(run._prepare_inputs, run.get_train_dataloader())
    ]
    sum(losses).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in trained])
    before = adapter(model)
    model.zero_grad()
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(sum(losses).item(), rel=1e-4)
    assert float((adapter(model) - expected).norm() / (expected - before).norm()) < 1e-3


def test_training_finds_what_belongs_together(tmp_path: Path) -> None:
    model = embedder(tmp_path / "base", "qwen3")
    options = {
        "max_steps": 12,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 12,
    }
    run = EmbeddingTrainer(model, settings(tmp_path, **options), PAIRS, PAIRS)
    before, trained, after = run.evaluate(), run.train(), run.evaluate()
    assert trained.global_step == 12 and after["eval_loss"] < before["eval_loss"] / 2
    assert before["eval_recall@1"] < 0.5 and after["eval_recall@1"] > 0.9
    assert after["eval_ndcg@10"] <= 1 and after["eval_mrr@10"] >= after["eval_recall@1"]


@pytest.mark.parametrize("loss", ["cosent", "cosine"])
def test_scored_pairs_are_ranked(tmp_path: Path, loss: str) -> None:
    model = embedder(tmp_path / "base", "llama", pooling="mean")
    options = {
        "max_steps": 12,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 36,
    }
    run = EmbeddingTrainer(model, settings(tmp_path, loss=loss, **options), SCORED, SCORED)
    before = run.evaluate()["eval_spearman"]
    run.train()
    assert run.evaluate()["eval_spearman"] > max(before, 0.6)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }
    whole = embedder(tmp_path / "base", "qwen3")
    EmbeddingTrainer(whole, settings(tmp_path / "a", **options), PAIRS).train()
    model = embedder(tmp_path / "base", "qwen3")
    run = EmbeddingTrainer(model, settings(tmp_path / "b", **{**options, "max_steps": 2}), PAIRS)
    with pytest.raises(CheckpointMissing):
        run.train(resume_from_checkpoint=True)
    run.train()
    model = embedder(tmp_path / "base", "qwen3")
    EmbeddingTrainer(model, settings(tmp_path / "b", **options), PAIRS).train(resume_from_checkpoint=True)
    assert torch.equal(adapter(model), adapter(whole))
    # A checkpoint is an embedding model by itself.
    again, _ = FastEmbeddingModel.from_pretrained(tmp_path / "b" / "checkpoint-4", dtype="float32")
    assert np.abs(again.encode("grass") - whole.encode("grass")).max() < 1e-6


def test_the_best_checkpoint_is_found_by_a_figure_of_retrieval(tmp_path: Path) -> None:
    model = embedder(tmp_path / "base", "llama")
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 2}
    options |= {"metric_for_best_model": "ndcg@10", "greater_is_better": True, "load_best_model_at_end": True}
    run = EmbeddingTrainer(model, settings(tmp_path, **options), PAIRS, PAIRS)
    run.train()
    assert run.state.best_metric == max(
        e["eval_ndcg@10"] for e in run.state.log_history if "eval_ndcg@10" in e
    )


def test_prompts_stand_in_front_of_their_sides(tmp_path: Path) -> None:
    folder = save_embedder(tmp_path / "base", "llama")
    write_layout(folder, Layout("last", True, {"query": "find: ", "passage": "x"}, None, 60), 64)
    model, tokenizer = FastEmbeddingModel.from_pretrained(folder, dtype="float32")
    rows = [{"query": "grass", "document": "green"}]
    for options, expected in (
        ({}, "find: grass|green"),
        ({"query_prompt": "", "document_prompt": "d: "}, "grass|d: green"),
    ):
        run = EmbeddingTrainer(model, settings(tmp_path, **options), eval_dataset=rows)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in run.eval_dataset[0].texts]
        assert "|".join(texts) == expected


def test_full_finetuning_saves_the_whole_model(tmp_path: Path) -> None:
    folder = save_embedder(tmp_path / "base", "bert")
    model, _ = FastEmbeddingModel.from_pretrained(folder, dtype="float32", full_finetuning=True)
    run = EmbeddingTrainer(model, settings(tmp_path / "out"), PAIRS)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    again, _ = FastEmbeddingModel.from_pretrained(tmp_path / "saved", dtype="float32")
    assert np.abs(again.encode("grass") - model.encode("grass")).max() < 1e-6
    assert embedder_of(again).layout == embedder_of(model).layout
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["BertModel"]


@pytest.mark.parametrize(
    ("options", "rows", "says"),
    [
        ({"loss": "info_nze"}, PAIRS, "loss='info_nze' does not exist"),
        ({"loss": "cosent"}, PAIRS, "not for rows without a score"),
        ({"loss": "info_nce"}, SCORED, "not for rows with a score"),
        ({"loss": "triplet"}, PAIRS, "needs rows with a negative"),
        ({"per_device_train_batch_size": 1}, PAIRS, "one row without negatives"),
        ({"matryoshka_dims": [8, 65]}, PAIRS, "vectors have 64 elements"),
        ({"scale": 0.0}, PAIRS, "not positive"),
        ({"gradient_cache_texts": 0}, PAIRS, "cannot run"),
    ],
)
def test_what_teaches_nothing_is_refused(tmp_path: Path, options: dict, rows: list, says: str) -> None:
    folder = save_embedder(tmp_path / "base", "llama")
    model, _ = FastEmbeddingModel.from_pretrained(folder, dtype="float32")
    with pytest.raises(UnknownArgument, match=says):
        EmbeddingTrainer(model, settings(tmp_path, **options), rows)


def test_one_row_with_negatives_is_enough(tmp_path: Path) -> None:
    rows = [{**row, "negative": "something else"} for row in PAIRS[:2]]
    model = embedder(tmp_path / "base", "llama")
    for loss in ("info_nce", "triplet"):
        options = {"loss": loss, "per_device_train_batch_size": 1}
        assert EmbeddingTrainer(model, settings(tmp_path, **options), rows).train().training_loss > 0


@pytest.mark.parametrize(
    ("kind", "bits", "storage"),
    [("qwen3", "load_in_4bit", "nf4"), ("qwen3", "load_in_int8", "int8"), ("bert", "load_in_int8", None)],
)
def test_a_quantised_model_is_trained(tmp_path: Path, kind: str, bits: str, storage: str | None) -> None:
    if bits == "load_in_4bit":
        pytest.importorskip("bitsandbytes")
    model = embedder(tmp_path / "base", kind, **{bits: True})
    binding = model.get_base_model().pronghorn_binding
    assert binding.bound == (storage is not None) and (storage or "") in binding.describe()
    before = adapter(model)
    EmbeddingTrainer(model, settings(tmp_path, gradient_cache_texts=7), PAIRS).train()
    assert not torch.equal(adapter(model), before)
    expected = model.encode("grass")
    again, _ = FastEmbeddingModel.from_pretrained(
        model.save_embedding_adapter(tmp_path / "lora"), dtype="float32", **{bits: True}
    )
    assert np.abs(again.encode("grass") - expected).max() < 1e-6
    merged, _ = FastEmbeddingModel.from_pretrained(
        model.save_pretrained_merged(tmp_path / "m"), dtype="float32"
    )
    # int8 products round activations, too.
    assert float(merged.encode("grass") @ expected) > (0.9999 if bits == "load_in_4bit" else 0.99)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(tmp_path / "base", "llama")
    monkeypatch.setattr(EmbeddingConfig, "world_size", 2)
    with pytest.raises(PronghornError, match="trained on one GPU"):
        EmbeddingTrainer(model, settings(tmp_path), PAIRS)
