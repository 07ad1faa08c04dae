"""Vectors and every adapter gradient against stock Transformers and PEFT in fp64 on padded rows."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from pronghorn.embedding.batches import facts_of, tokenize_pairs
from pronghorn.embedding.gradient_cache import backward
from pronghorn.embedding.losses import Objective
from pronghorn.embedding.model import embedder_of
from pronghorn.embedding.rows import Pair
from pronghorn.embedding.tokens import tokenize
from pronghorn.embedding.vectors import Batcher, forward
from pronghorn.errors import UnknownArgument
from tests.embedding.models import TEXTS, embedder, stock_copy, stock_vectors
from tests.families.parity import relative_error

PAIRS = [
    Pair("open a file", "Opens the file and returns it.", ("Closes it.", "Grass " * 12)),
    Pair("close", "Closes the file."),
    Pair("sort a list " * 4, "Sorts it in place."),
]
MODELS = [
    ("llama", "last"), ("qwen2", "mean"), ("qwen3", "last"), ("gemma3_text", "last"), ("gemma2", "mean"),
    ("bert", "mean"), ("roberta", "cls"), ("xlm-roberta", "mean"), ("modernbert", "last"),
]  # fmt: skip


def _gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("kind", "pooling"), MODELS)
def test_vectors_and_gradients_are_those_of_stock_models(tmp_path: Path, kind: str, pooling: str) -> None:
    model = embedder(tmp_path, kind, pooling=pooling, normalize=False)
    stock, found = stock_copy(model), embedder_of(model)
    decoder = model.get_base_model().pronghorn_binding.bound
    assert decoder == (kind not in ("bert", "roberta", "xlm-roberta", "modernbert"))
    ids = [text.tolist() for text in tokenize(found.tokenizer, TEXTS, None)]
    # Published embedding models of Qwen's kind pad on the left; stock Gemma 2 gives NaN there.
    expected = stock_vectors(stock, ids, pooling, "left" if kind in ("llama", "qwen2", "qwen3") else "right")
    # fp32 against fp64 over two layers.
    assert relative_error(torch.from_numpy(model.encode(TEXTS)), expected.detach().float()) < 2e-5

    model.double()  # now only the order of operations differs, and norms that stock models compute in fp32
    rows = tokenize_pairs(PAIRS, found.tokenizer, None, "", "")
    texts = [row.texts[side] for side in (0, 1) for row in rows] + [t for row in rows for t in row.texts[2:]]
    facts, objective = facts_of(rows), Objective("info_nce", symmetric=True, dims=(32, 16))
    expected_loss = objective(stock_vectors(stock, [t.tolist() for t in texts], pooling, "right"), facts)
    expected_loss.backward()
    batch = Batcher(model, 0)(texts)
    assert (batch["kept"] is None) == decoder
    model.train()
    loss = backward([batch], lambda part: forward(model, part, pooling), lambda v: objective(v, facts))
    assert abs(float(loss) - expected_loss.item()) < 1e-5 * expected_loss.item()
    ours, stocks = _gradients(model), _gradients(stock)
    assert ours.keys() == stocks.keys() and any("lora_A" in name for name in ours)
    for name, gradient in stocks.items():
        assert relative_error(ours[name], gradient) < 1e-5, name


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
@pytest.mark.parametrize("size", [1, 3])
def test_gradient_cache_gives_the_gradient_of_one_batch(tmp_path: Path, kind: str, size: int) -> None:
    model = embedder(tmp_path, kind, pooling="mean", lora_dropout=0.2).double()
    found = embedder_of(model)
    rows = tokenize_pairs(PAIRS, found.tokenizer, None, "", "")
    texts = [row.texts[side] for side in (0, 1) for row in rows] + [t for row in rows for t in row.texts[2:]]
    facts, batcher, objective = facts_of(rows), Batcher(model, 0), Objective("info_nce")
    parts = [batcher(texts[start : start + size]) for start in range(0, len(texts), size)]
    model.train()
    torch.manual_seed(5)
    whole = objective(torch.cat([forward(model, part, "mean") for part in parts]), facts)
    whole.backward()
    expected = _gradients(model)
    torch.manual_seed(5)
    loss = backward(parts, lambda part: forward(model, part, "mean"), lambda v: objective(v, facts))
    assert float(loss) == pytest.approx(whole.item(), rel=1e-12)
    cached = _gradients(model)
    assert cached.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(cached[name], gradient) < 1e-10, name


def test_vectors_do_not_depend_on_what_shares_their_batch(tmp_path: Path) -> None:
    model = embedder(tmp_path, "qwen3")
    together = model.encode(TEXTS, batch_tokens=10_000)
    assert np.abs(model.encode(TEXTS, batch_tokens=1) - together).max() < 1e-6
    assert np.abs(model.encode(TEXTS[::-1])[::-1] - together).max() < 1e-6
    assert np.abs(model.encode(TEXTS[2]) - together[2]).max() < 1e-6 and together[2].ndim == 1
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for dim in (0, together.shape[1] + 1):
        with pytest.raises(UnknownArgument, match=f"dim={dim} is no length"):
            model.encode(TEXTS, dim=dim)
    short = model.encode(TEXTS, dim=8)
    assert short.shape == (4, 8) and np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    assert model.encode([]).shape == (0, 64)
    twin = copy.deepcopy(model)
    assert twin.encode.args[0] is twin
    assert np.abs(twin.encode(TEXTS) - together).max() < 1e-6
