"""Answers and scores of a base and its adapters are those of Transformers and PEFT, one after another."""

from __future__ import annotations

import math

import pytest
import torch

from pronghorn.errors import RowInvalid
from pronghorn.inference.compare import compare_prompts, compare_rows, token_f1
from pronghorn.inference.variants import load_variants
from tests.inference.adapters import (
    save_base_and_adapters,
    stock_answer,
    stock_model,
    stock_tokenizer,
)

NAMES = ["base", "formal", "casual.v2"]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Hi there"},
            {"role": "assistant", "content": "the fast deer"},
        ]
    },
    {"prompt": "What does it eat?", "completion": " Grass and cactus"},
    {
        "messages": [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "Three"},
            {"role": "assistant", "content": "four and five"},
        ]
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base_and_adapters(tmp_path_factory.mktemp("compared"))


@pytest.fixture(scope="module")
def loaded(folder):
    adapters = {name: str(folder / name) for name in NAMES[1:]}
    return load_variants(str(folder / "base"), adapters, load_in_4bit=False, dtype="float32")


def test_answers_side_by_side(loaded, folder):
    conversations = [[{"role": "user", "content": text}] for text in ("Hi", "What does it eat?")]
    compared = compare_prompts(*loaded, conversations, max_new_tokens=10)
    assert compared.scores == {}
    for asked, messages in zip(compared.asked, conversations, strict=True):
        assert asked.question == messages[-1]["content"]
        expected = {name: stock_answer(folder, name, messages, 10).strip() for name in NAMES}
        assert asked.answers == expected
        assert len(set(expected.values())) == 3


def answer_spans(tokenizer, row):
    """(all tokens, [start, end) of the assistant's turns), by the template's own text around them."""
    if "prompt" in row:
        before = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        return ids, [(len(before), len(ids))]
    ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
    spans = []
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            asked = tokenizer.apply_chat_template(
                row["messages"][:i], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            end = ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>"), len(asked)) + 1
            spans.append((len(asked), end))
    return ids, spans


@pytest.mark.parametrize("name", ["base", "formal"])
def test_the_loss_is_that_of_the_answers(loaded, folder, name):
    model, variants = loaded
    score = compare_rows(model, variants[:2], ROWS, max_new_tokens=4).scores[name]
    stock, tokenizer = stock_model(folder, name), stock_tokenizer(name)
    total, count = 0.0, 0
    for row in ROWS:
        ids, spans = answer_spans(tokenizer, row)
        with torch.no_grad():
            logprobs = stock(torch.tensor([ids])).logits[0].log_softmax(-1)
        for start, end in spans:
            total -= sum(float(logprobs[i - 1, ids[i]]) for i in range(start, end))
            count += end - start
    assert score.tokens == count
    assert score.loss == pytest.approx(total / count, abs=1e-4)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.rows == 3


def test_rows_are_asked_their_last_question(loaded, folder):
    model, variants = loaded
    compared = compare_rows(model, variants[:2], ROWS, max_new_tokens=6)
    assert [asked.question for asked in compared.asked] == ["Hi there", "What does it eat?", "Three"]
    assert [asked.reference for asked in compared.asked] == [
        "the fast deer",
        "Grass and cactus",
        "four and five",
    ]
    expected = stock_answer(folder, "formal", ROWS[2]["messages"][:-1], 6).strip()
    assert compared.asked[2].answers["formal"] == expected
    assert model.active_adapter == "adapter0"  # as it was


def test_a_perfect_answer_scores_one(loaded):
    """The base's own greedy answers as the rows' answers."""
    model, variants = loaded
    question = [{"role": "user", "content": "Hi there"}]
    answer = compare_prompts(model, variants[:1], [question], max_new_tokens=5).asked[0].answers["base"]
    row = {"messages": [*question, {"role": "assistant", "content": answer}]}
    score = compare_rows(model, variants[:2], [row], max_new_tokens=5).scores
    assert (score["base"].exact_match, score["base"].token_f1) == (1.0, 1.0)
    assert score["formal"].exact_match == 0.0


def test_rows_without_a_question(loaded):
    with pytest.raises(RowInvalid, match="no question") as found:
        compare_rows(*loaded, [ROWS[0], {"text": "only text"}])
    assert found.value.where == "row 2"


@pytest.mark.parametrize(
    "answer,reference,expected",
    [
        ("the fast deer", "The fast deer!", 1.0),
        ("the deer", "the fast deer", 0.8),
        ("a a a", "a", 0.5),
        ("", "", 1.0),
        ("", "deer", 0.0),
        ("水沸腾", "水会沸腾", 2 * 3 / 7),
    ],
)
def test_shared_words(answer, reference, expected):
    assert token_f1(answer, reference) == pytest.approx(expected)
