"""A batch holds every token once, keeps documents apart, and says which positions predict something."""

from __future__ import annotations

import pytest
import torch

from pronghorn.data.collator import Collator, documents_of

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [5, -100, 7]},
    {"input_ids": [8, 9, 10, 11, 12], "labels": [8, 9, 10, -100, 12], "seq_lengths": [2, 3]},
]


def test_flat_batch():
    batch = Collator(pad_token_id=0)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100, -100, 12]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 8]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert batch["document_lengths"] == (3, 2, 3)
    assert batch["real_tokens"] == 8
    # Row t predicts label t + 1.
    assert batch["loss_rows"].tolist() == [1, 3, 6]


def test_loss_rows_never_cross_a_document():
    rows = [{"input_ids": [1], "labels": [1]}, {"input_ids": [2, 3], "labels": [2, 3]}]
    assert Collator(pad_token_id=0)(rows)["loss_rows"].tolist() == [1]


def test_labels_default_to_the_tokens():
    assert Collator(pad_token_id=0)([{"input_ids": [1, 2]}])["labels"].tolist() == [[-100, 2]]


def test_the_rows_given_are_not_changed():
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    Collator(pad_token_id=0)([row])
    assert row["labels"] == [1, 2]


def test_padding_up_is_a_document_of_its_own():
    batch = Collator(pad_token_id=0, pad_to_multiple_of=6)(ROWS)
    assert batch["input_ids"].shape == (1, 12)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 12]
    assert batch["position_ids"][0, 8:].tolist() == [0, 1, 2, 3]
    assert batch["labels"][0, 8:].tolist() == [-100] * 4
    assert batch["real_tokens"] == 8
    assert batch["max_length_q"] == 4


def test_padded_batch_has_a_row_for_each_document():
    batch = Collator(pad_token_id=0, flat=False)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0], [10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100], [-100, -100, 12]]
    assert Collator(pad_token_id=0, flat=False, pad_to_multiple_of=8)(ROWS)["input_ids"].shape == (3, 8)


def test_a_stock_model_is_given_nothing_it_does_not_know():
    batch = Collator(pad_token_id=0, for_engine=False)(ROWS)
    assert not {"loss_rows", "document_lengths"} & batch.keys()


def test_inconsistent_rows_are_refused():
    with pytest.raises(ValueError, match="3 input_ids, 2 labels"):
        documents_of({"input_ids": [1, 2, 3], "labels": [1, 2]})
    with pytest.raises(ValueError, match="documents of 4"):
        documents_of({"input_ids": [1, 2, 3], "seq_lengths": [2, 2]})
    with pytest.raises(ValueError, match="without a single token"):
        Collator(pad_token_id=0)([{"input_ids": []}])
