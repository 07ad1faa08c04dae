"""The parts of a batch add up to it: tokens, supervised rows, losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.data.budgets import Budgets
from pronghorn.data.collator import BOOKKEEPING, Collator
from pronghorn.data.rows import IGNORED
from pronghorn.data.split import split_batch
from tests.families.parity import add_adapter, assert_same, bound_copy, relative_error, run
from tests.tiny import tiny_model

LENGTHS = (9, 30, 5, 14, 3)


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in lengths:
        ids = torch.randint(3, 300, (length,), generator=generator)
        labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.4, IGNORED)
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


COLLATORS = {
    "engine": Collator(0),
    "budgets": Collator(0, budgets=Budgets()),
    "transformers": Collator(0, for_engine=False),
    "padded": Collator(0, flat=False),
    "rounded": Collator(0, pad_to_multiple_of=32),
}


@pytest.mark.parametrize("kind", COLLATORS)
def test_losses_and_gradients_add_up(kind: str) -> None:
    model = bound_copy(add_adapter(tiny_model("llama", dtype=torch.float64)), "none")
    batch = COLLATORS[kind](rows())
    total = int((batch["labels"] != IGNORED).sum())
    parts = split_batch(batch)
    assert parts is not None

    def outcome(part: dict[str, Any]) -> Any:
        given = {k: v for k, v in part.items() if k not in (*BOOKKEEPING, "supervised")}
        return run(model, {**given, "num_items_in_batch": total}, logits=False)

    whole, *halves = (outcome(part) for part in (batch, *parts))
    summed = halves[0]
    summed.loss = summed.loss + halves[1].loss
    summed.gradients = {n: g + halves[1].gradients[n] for n, g in summed.gradients.items()}
    # The loss is summed in fp32: one rounding more.
    assert relative_error(summed.loss, whole.loss) < 1e-6
    summed.loss = whole.loss
    assert_same(summed, whole, 5e-6)


@pytest.mark.parametrize("kind", COLLATORS)
def test_nothing_is_lost_or_counted_twice(kind: str) -> None:
    batch = COLLATORS[kind](rows())
    parts = split_batch(batch)
    assert parts is not None
    assert sum(part["real_tokens"] for part in parts) == batch["real_tokens"] == sum(LENGTHS)
    assert sum(int((part["labels"] != IGNORED).sum()) for part in parts) == int(
        (batch["labels"] != IGNORED).sum()
    )
    assert sum(part["input_ids"].numel() for part in parts) == batch["input_ids"].numel()
    if "loss_rows" in batch:
        for part in parts:
            assert (part["labels"][0, part["loss_rows"] + 1] != IGNORED).all()
            assert sum(part["document_lengths"]) == part["input_ids"].shape[1]


def test_cut_where_the_larger_part_is_smallest() -> None:
    parts = split_batch(Collator(0)(rows()))
    assert parts is not None
    assert [part["document_lengths"] for part in parts] == [(9, 30), (5, 14, 3)]
    assert [int(part["max_length_q"]) for part in parts] == [30, 14]
    assert parts[1]["cu_seq_lens_q"].tolist() == [0, 5, 19, 22]
    assert parts[1]["cu_seq_lens_q"].dtype == torch.int32
    assert parts[1]["position_ids"][0, :6].tolist() == [0, 1, 2, 3, 4, 0]


def test_parts_split_again_until_documents_are_alone() -> None:
    waiting, alone = [Collator(0)(rows())], []
    while waiting:
        parts = split_batch(waiting[-1])
        batch = waiting.pop()
        waiting += list(parts) if parts is not None else []
        alone += [] if parts is not None else [batch["document_lengths"]]
    assert sorted(alone) == sorted((length,) for length in LENGTHS)


@pytest.mark.parametrize("kind", ["engine", "transformers", "padded"])
def test_a_single_document_cannot_be_split(kind: str) -> None:
    assert split_batch(COLLATORS[kind](rows((12,)))) is None
