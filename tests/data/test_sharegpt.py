"""Conversations under other names come out as role and content, and nothing is guessed."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict

from pronghorn import standardize_data_formats, standardize_sharegpt
from pronghorn.errors import DatasetUnusable, RowInvalid

SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi?"},
    {"from": "gpt", "value": "Hello."},
]
PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
]


def rows_of(dataset, column="conversations"):
    return [
        [{k: v for k, v in message.items() if v is not None} for message in row[column]] for row in dataset
    ]


def test_names_are_brought_to_role_and_content_and_other_columns_stay():
    data = Dataset.from_list([{"conversations": SHAREGPT, "id": 7}] * 2)
    done = standardize_sharegpt(data)
    assert rows_of(done) == [PLAIN] * 2
    assert done["id"] == [7, 7] and set(done.column_names) == {"conversations", "id"}
    assert rows_of(standardize_data_formats(done)) == [PLAIN] * 2


def test_lists_streams_and_splits():
    rows = [{"conversations": SHAREGPT}] * 2
    assert standardize_sharegpt(rows) == [{"conversations": PLAIN}] * 2
    assert rows_of(standardize_sharegpt(Dataset.from_list(rows).to_iterable_dataset())) == [PLAIN] * 2
    splits = standardize_sharegpt(
        DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:1]))
    )
    assert type(splits) is DatasetDict and rows_of(splits["test"]) == [PLAIN]


def test_aliases_and_the_column_messages():
    rows = [{"messages": [{"role": "Customer", "content": "a"}, {"role": "AGENT", "content": "b"}]}]
    done = standardize_sharegpt(rows, aliases_for_user=["customer"], aliases_for_assistant=["agent"])
    assert done == [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


def test_what_cannot_be_standardised_is_told_with_its_row():
    bad = [{"conversations": SHAREGPT}, {"conversations": [{"from": "narrator", "value": "x"}]}]
    with pytest.raises(RowInvalid, match=r"unknown role 'narrator' \(row 1\).*aliases_for_user"):
        standardize_sharegpt(bad)
    with pytest.raises(RowInvalid, match=r"not a list of messages \(row 0\)"):
        standardize_sharegpt([{"conversations": "x"}])
    with pytest.raises(DatasetUnusable, match="text"):
        standardize_sharegpt(Dataset.from_list([{"text": "x"}]))
