"""Data sets as a whole: truncation, packing, streams, formatting functions, and rows that cannot be trained on."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset

from pronghorn.data.prepare import Preparation, prepare_dataset
from pronghorn.data.rows import RowFormat, RowRenderer
from pronghorn.errors import DatasetUnusable, NothingSupervised, RowInvalid, SequenceTooLong
from tests.tiny import tiny_tokenizer

TEXTS = [{"text": "word " * n} for n in (3, 9, 1, 6, 2, 12)]


def preparation(form: RowFormat | None = None, **options) -> Preparation:
    return Preparation(RowRenderer(tiny_tokenizer(), form or RowFormat()), **options)


def prepared(rows, form=None, *, stream=False, **options):
    dataset = Dataset.from_list(rows)
    return prepare_dataset(dataset.to_iterable_dataset() if stream else dataset, preparation(form, **options))


@pytest.mark.parametrize("stream", [False, True])
def test_packing_keeps_every_document(stream):
    whole = [row["input_ids"] for row in prepared(TEXTS)]
    packed = list(prepared(TEXTS, stream=stream, packing=True, max_length=80))
    assert len(packed) < len(whole)
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 80
        start = 0
        for length in row["seq_lengths"]:
            found.append(list(row["input_ids"][start : start + length]))
            start += length
    assert sorted(found) == sorted(whole)


def test_packing_reads_through_a_selection():
    dataset = Dataset.from_list(TEXTS).select([5, 0, 2])
    packed = prepare_dataset(dataset, preparation(packing=True, max_length=500))
    assert len(packed) == 1
    text = tiny_tokenizer().decode(packed[0]["input_ids"])
    assert text.count("<|end|>") == 3 and text.count("word") == 16


def test_truncation_is_noted_once_and_cuts(caplog):
    with caplog.at_level(logging.WARNING, "pronghorn"):
        rows = prepared(TEXTS, max_length=10)
    assert max(len(row["input_ids"]) for row in rows) == 10
    notes = [record.getMessage() for record in caplog.records if "max_length" in record.getMessage()]
    assert len(notes) == 1 and "of 6 rows of the train data are cut to max_length=10" in notes[0]


def test_truncation_can_keep_the_end():
    cut = prepared(TEXTS, max_length=4, keep_end=True)[0]["input_ids"]
    assert cut == prepared(TEXTS)[0]["input_ids"][-4:]


def test_rows_that_lose_their_answer_are_left_out(caplog):
    rows = [{"prompt": "p" * 30, "completion": "c"}, {"prompt": "p", "completion": "c"}]
    with caplog.at_level(logging.WARNING, "pronghorn"):
        kept = prepared(rows, max_length=10)
    assert len(kept) == 1
    assert "1 of them lose every token to train on and are left out" in caplog.text
    assert len(list(prepared(rows, max_length=10, stream=True))) == 1
    with pytest.raises(NothingSupervised, match="max_length=10"):
        prepared(rows[:1], max_length=10)


QUESTIONS = [
    {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
    {"messages": [{"role": "user", "content": "?"}]},
    {"messages": [{"role": "user", "content": "??"}]},
]


def test_rows_without_an_answer_are_an_error():
    form = RowFormat(responses_only=True)
    with pytest.raises(NothingSupervised, match=r"PH302.*2 of 3 rows.*rows 1, 2.*row 1 of the train data"):
        prepared(QUESTIONS, form)
    with pytest.raises(NothingSupervised, match="row 1 of the train data"):
        list(prepared(QUESTIONS, form, stream=True))
    assert len(prepared(QUESTIONS, form, drop_unsupervised=True)) == 1
    assert len(list(prepared(QUESTIONS, form, drop_unsupervised=True, stream=True))) == 1


def test_longer_than_the_model_takes():
    with pytest.raises(SequenceTooLong, match=r"PH304.*takes 20.*row 1 of"):
        prepared(TEXTS, context=20)
    with pytest.raises(SequenceTooLong, match="row 1 of"):
        list(prepared(TEXTS, context=20, stream=True))
    assert len(prepared(TEXTS, context=20, max_length=20)) == 6


def test_a_bad_row_is_named():
    rows = [QUESTIONS[0], {"messages": []}]
    with pytest.raises(RowInvalid, match=r"PH301.*row 1 of the train data"):
        prepared(rows)
    with pytest.raises(RowInvalid, match="row 1 of the train data"):
        list(prepared(rows, stream=True))


def test_formatting_function_of_a_row():
    dataset = Dataset.from_list([{"a": "one", "b": "two"}, {"a": "three", "b": "four"}])
    rows = prepare_dataset(dataset, preparation(formatting_func=lambda row: f"{row['a']}-{row['b']}"))
    assert tiny_tokenizer().decode(rows[1]["input_ids"]) == "three-four<|end|>"


@pytest.mark.parametrize("as_dict", [False, True])
def test_formatting_function_of_a_batch(as_dict):
    def function(rows):
        texts = [f"{a}-{b}" for a, b in zip(rows["a"], rows["b"], strict=True)]
        return {"text": texts} if as_dict else texts

    dataset = Dataset.from_list([{"a": "one", "b": "two"}, {"a": "three", "b": "four"}])
    rows = prepare_dataset(dataset, preparation(formatting_func=function))
    assert tiny_tokenizer().decode(rows[0]["input_ids"]) == "one-two<|end|>"


def test_formatting_function_of_no_known_kind():
    with pytest.raises(RowInvalid, match="formatting_func"):
        prepared(TEXTS, formatting_func=lambda rows: 3)


def test_prepared_rows_prepare_to_themselves():
    once = prepared(TEXTS)
    again = prepare_dataset(once, preparation())
    assert again["input_ids"][:] == once["input_ids"][:]
    packed = prepared(TEXTS, packing=True, max_length=80)
    assert prepare_dataset(packed, preparation())["seq_lengths"][:] == packed["seq_lengths"][:]


def test_unusable_data():
    with pytest.raises(DatasetUnusable, match="no rows"):
        prepare_dataset(Dataset.from_list([]), preparation())
    with pytest.raises(DatasetUnusable, match="row length"):
        prepared(TEXTS, packing=True)
    with pytest.raises(DatasetUnusable, match="transform"):
        prepare_dataset(Dataset.from_list(TEXTS).with_transform(lambda rows: rows), preparation())


def test_shuffling_is_by_seed():
    order = [row["input_ids"] for row in prepared(TEXTS, shuffle_seed=3)]
    assert order == [row["input_ids"] for row in prepared(TEXTS, shuffle_seed=3)]
    assert order != [row["input_ids"] for row in prepared(TEXTS)]


@pytest.mark.parametrize("stream", [False, True])
def test_every_document_keeps_its_number(stream):
    """Through leaving out rows, shuffling and packing: the numbers are those of the data as given."""
    # What stands beyond max_length is cut off: of two rows nothing is left to learn.
    prompts = ["word " * 60 if n in (0, 3) else f"{n}" for n in range(7)]
    rows = [{"prompt": prompt, "completion": f"answer {n}"} for n, prompt in enumerate(prompts)]
    form = RowFormat(completion_only=True)
    packed = prepared(
        rows, form, stream=stream, packing=True, max_length=40, drop_unsupervised=True, shuffle_seed=1
    )
    tokenizer, numbers = tiny_tokenizer(), []
    for row in packed:
        start = 0
        for number, length in zip(row["rows"], row["seq_lengths"], strict=True):
            assert f"answer {number}" in tokenizer.decode(row["input_ids"][start : start + length])
            numbers.append(number)
            start += length
    assert sorted(numbers) == [1, 2, 4, 5, 6]
