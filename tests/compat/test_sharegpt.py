"""Tables as conversations, and conversations in a format that is shown by example."""

import pytest
from datasets import Dataset

from pronghorn.compat.sharegpt import apply_chat_template, to_sharegpt
from pronghorn.data.answers import answer_finder
from pronghorn.data.sharegpt import standardize_sharegpt
from pronghorn.errors import DatasetUnusable, UnknownArgument
from tests.data.chat_tokenizers import chat_tokenizer

ROWS = Dataset.from_list(
    [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hello.", "input": "", "output": "Hello"},
        {"instruction": "Count.", "input": None, "output": "1 2 3"},
    ]
)
PROMPT = "{instruction}[[\nYour input is:\n{input}]]"
HEAD = "Write answers.\n\n"
TURN = "### Question:\n{INPUT}\n\n### Answer:\n{OUTPUT}"
LLAMA_TURN = (
    "<|start_header_id|>user<|end_header_id|>\n\n{INPUT}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{OUTPUT}<|eot_id|>"
)
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
    + LLAMA_TURN
    + LLAMA_TURN
)


def test_columns_become_questions_and_answers():
    rows = to_sharegpt(ROWS, PROMPT, output_column_name="output")
    assert rows.column_names == ["conversations"]
    asked = [row["conversations"][0]["value"] for row in rows]
    assert asked == ["Add.\nYour input is:\n1 and 2", "Say hello.", "Count."]
    assert rows[1]["conversations"][1] == {"from": "gpt", "value": "Hello"}
    longer = to_sharegpt(ROWS, PROMPT, conversation_extension=3, remove_unused_columns=False)
    assert all(len(row["conversations"]) == 6 for row in longer) and "input" in longer.column_names
    assert longer[0]["conversations"][:2] == rows[0]["conversations"]
    with pytest.raises(DatasetUnusable, match="no column 'question'"):
        to_sharegpt(ROWS, "{question}")


@pytest.mark.parametrize("twice", [False, True])
def test_headings_shown_once_or_twice_are_one_format(twice):
    tokenizer = chat_tokenizer("llama-2")
    example = HEAD + TURN + ("\n\n" + TURN if twice else "")
    rows = to_sharegpt(ROWS, PROMPT, conversation_extension=2)
    first, second = (rows[1]["conversations"][at]["value"] for at in (2, 3))
    text = apply_chat_template(rows, tokenizer, example)[1]["text"]
    assert text == (
        "Write answers.\n\n### Question:\nSay hello.\n\n### Answer:\nHello</s>"
        f"\n\n### Question:\n{first}\n\n### Answer:\n{second}</s>"
    )
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "Write answers.\n\n### Question:\nWhy?\n\n### Answer:\n"


def test_control_tokens_a_system_message_and_what_is_learnt():
    tokenizer = chat_tokenizer("llama-3")
    rows = standardize_sharegpt(to_sharegpt(ROWS, PROMPT))
    text = apply_chat_template(rows, tokenizer, LLAMA, default_system_message="It's fine")[0]["text"]
    assert text == LLAMA.partition(LLAMA_TURN)[0].format(SYSTEM="It's fine") + LLAMA_TURN.format(
        INPUT="Add.\nYour input is:\n1 and 2", OUTPUT="3"
    )
    assert tokenizer.eos_token == "<|eot_id|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    learnt = [token for token, inside in zip(ids, answer_finder(tokenizer)(ids), strict=True) if inside]
    assert tokenizer.decode(learnt) == "3<|eot_id|>"


@pytest.mark.parametrize(
    "example", ["{INPUT}", "{OUTPUT} {INPUT}", "{INPUT}{OUTPUT}{OUTPUT}", "Header\n\n{INPUT}{OUTPUT}"]
)
def test_an_example_that_shows_too_little_is_refused(example):
    with pytest.raises(UnknownArgument, match="chat template"):
        apply_chat_template(to_sharegpt(ROWS, PROMPT), chat_tokenizer("llama-2"), example)
