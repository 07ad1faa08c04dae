"""Passes of static shape: recorded and in parts they are the step of the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pronghorn.embedding import EmbeddingTrainer
from pronghorn.embedding.memory import EmbeddingMemory, halved
from pronghorn.embedding.vectors import Batcher, forward
from pronghorn.engine import TrainingStep
from pronghorn.training.steps import StaticSteps
from tests.embedding.models import TEXTS, embedder
from tests.embedding.test_trainer import PAIRS, SCORED, adapter, settings
from tests.engine.recorded import pretend_to_record

NEGATIVES = [{**pair, "negative": PAIRS[i - 1]["positive"]} for i, pair in enumerate(PAIRS)]


def trained(tmp_path: Path, rows: list, **options) -> tuple[torch.Tensor, EmbeddingTrainer]:
    model = embedder(tmp_path / "base", "qwen3", pooling=options.pop("pooling", "auto"))
    before = adapter(model)
    run = EmbeddingTrainer(model, settings(tmp_path, **{"max_steps": 3, **options}), rows)
    run.train()
    return adapter(model) - before, run


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("texts", [None, 5])
@pytest.mark.parametrize("rows", [NEGATIVES, SCORED], ids=["negatives", "scores"])
def test_recorded_steps_train_as_eager_ones(tmp_path, monkeypatch, rows, texts, pooling) -> None:
    given = {"gradient_cache_texts": texts, "pooling": pooling, "gradient_accumulation_steps": 2}
    expected, _ = trained(tmp_path, rows, **given)
    pretend_to_record(monkeypatch)
    monkeypatch.setattr(StaticSteps, "captures", True)
    found, run = trained(tmp_path, rows, **given)
    step = run._steps._step
    assert step.reason is None and 0 < step.captured <= (1 if texts is None else 8)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_a_batch_that_does_not_fit_is_the_same_in_parts(tmp_path, monkeypatch, caplog) -> None:
    expected, _ = trained(tmp_path, NEGATIVES)
    execute = TrainingStep._execute

    def short(self, batch, counts):
        if "places" in batch:
            raise torch.OutOfMemoryError("as the test wants it")
        return execute(self, batch, counts)

    monkeypatch.setattr(TrainingStep, "_execute", short)
    found, _ = trained(tmp_path, NEGATIVES)
    assert "run in parts" in caplog.text
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_halves_have_the_texts_of_the_whole(tmp_path) -> None:
    model = embedder(tmp_path / "base", "llama").eval()
    texts = [torch.arange(3, 3 + 2 * len(text)).remainder(300).numpy() for text in TEXTS]
    part = Batcher(model, 0)(texts)
    with torch.no_grad():
        whole = forward(model, part, "mean")
        halves = halved(part)
        assert halves is not None and len(halves) == 2
        assert torch.allclose(torch.cat([forward(model, half, "mean") for half in halves]), whole, atol=1e-5)
    assert halved(Batcher(model, 0)(texts[:1])) is None


def test_the_rehearsal_holds_every_batch(tmp_path, monkeypatch) -> None:
    """A recorded rehearsal's sizes are at least those of any batch, so that memory runs out there or never."""
    sizes: list[tuple[int, int]] = []
    execute = TrainingStep._execute

    def watched(self, batch, counts):
        sizes.append((batch["input_ids"].numel(), len(batch["lengths"]) - 1))
        return execute(self, batch, counts)

    monkeypatch.setattr(TrainingStep, "_execute", watched)
    _, run = trained(tmp_path, NEGATIVES)
    largest = EmbeddingMemory(run).largest()
    assert largest.loss_rows == 0 and all(tokens <= largest.tokens for tokens, _ in sizes)
    assert largest.documents == sizes[0][1]
    sizes.clear()
    run._static_steps()._memory.rehearse(run._steps._step, largest)
    assert [tokens for tokens, _ in sizes] == [largest.tokens]
