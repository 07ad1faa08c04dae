"""Batches padded to few sizes: nothing of them is learned, and the sizes are few."""

from __future__ import annotations

import numpy as np
import pytest

from pronghorn.data.budgets import GRAIN, Budgets, row_budget, token_budget
from pronghorn.data.collator import Collator


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000, 2048, 2049, 8191, 8192, 100_000])
def test_a_token_budget_holds_the_tokens_and_little_more(tokens: int) -> None:
    budget = token_budget(tokens)
    assert tokens <= budget and budget % GRAIN == 0
    assert budget - tokens < max(GRAIN, tokens / 8 + 1)


def test_there_are_few_token_budgets() -> None:
    assert len({token_budget(tokens) for tokens in range(1024, 16385)}) == 4 * 8 + 1


def test_the_largest_batch_is_not_rounded() -> None:
    assert Budgets(limit=3000).tokens(2990) == 3000 and Budgets(limit=3000).tokens(3000) == 3000
    assert Budgets(limit=3000).tokens(100) == 128
    assert Budgets(limit=50).tokens(60) == token_budget(60)


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 255, 256])
def test_a_row_budget_is_a_quarter_two_three_or_all(rows: int) -> None:
    assert row_budget(rows, 256) in (64, 128, 192, 256) and row_budget(rows, 256) >= rows


def rows(lengths: list[int]) -> list[dict]:
    return [{"input_ids": list(range(5, 5 + n)), "labels": [-100, *range(6, 5 + n)]} for n in lengths]


def test_padding_documents_are_short_and_unsupervised() -> None:
    batch = Collator(pad_token_id=0, budgets=Budgets())(rows([40, 30]))
    assert (
        batch["input_ids"].shape == (1, 128) and batch["real_tokens"] == 70 and batch["supervised"] == 39 + 29
    )
    assert (batch["labels"][0, 70:] == -100).all() and (batch["input_ids"][0, 70:] == 0).all()
    lengths = batch["cu_seq_lens_q"].diff()
    assert tuple(lengths.tolist()) == batch["document_lengths"] and lengths.sum() == 128
    assert len(lengths) == 4 and batch["max_length_q"] == 64 >= lengths.max()
    assert batch["position_ids"][0].tolist()[:71] == [*range(40), *range(30), 0]
    # Rows of the loss are filled up with the last position, which predicts nothing.
    assert len(batch["loss_rows"]) == 96 and set(batch["loss_rows"][68:].tolist()) == {127}


def test_documents_and_their_longest_only_grow() -> None:
    collator = Collator(pad_token_id=0, budgets=Budgets())
    shapes = []
    for lengths in ([60, 60], [10] * 12, [100], [5, 5]):
        batch = collator(rows(lengths))
        shapes.append((len(batch["cu_seq_lens_q"]) - 1, batch["max_length_q"]))
    documents, longest = np.array(shapes).T
    assert (np.diff(documents) >= 0).all() and (np.diff(longest) >= 0).all()
    assert shapes[1] == (16, 64) and shapes[3] == (16, 128)


def test_a_batch_without_budgets_is_as_it_was() -> None:
    batch = Collator(pad_token_id=0)(rows([40, 30]))
    assert batch["input_ids"].shape == (1, 70) and len(batch["loss_rows"]) == batch["supervised"] == 68
