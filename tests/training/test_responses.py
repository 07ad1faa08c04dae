"""The usual script: template, ShareGPT rows, rendered text, trainer, responses only. And with tools and packing."""

from __future__ import annotations

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pronghorn import get_chat_template, standardize_sharegpt, train_on_responses_only
from pronghorn.training import SFTTrainer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.runs import losses, settings
from tests.training.test_data import trained_texts

SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": "one?"},
            {"from": "gpt", "value": f"first {i}"},
            {"from": "human", "value": "two?"},
            {"from": "gpt", "value": "second"},
        ]
    }
    for i in range(4)
]
TOOLS = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]
}


def test_a_markers_empty_line_is_no_part_of_the_answer_however_it_is_cut():
    """GPT-2's rule makes one token of an empty line at the end of a text, and two in front of a word."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["ask:\n\n", "tell:\n\n"] * 9,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert len(tokenizer("\n\n")["input_ids"]) == 1 and len(tokenizer("\n\nit")["input_ids"]) == 4
    mask = train_on_responses_only(None, "ask:\n\n", "tell:\n\n", tokenizer=tokenizer, return_function=True)
    ids = tokenizer("ask:\n\nwhat tell:\n\nit is. ask:\n\n1 tell:\n\n2")["input_ids"]
    kept = mask({"input_ids": ids})["labels"]
    assert tokenizer.decode([token for token in kept if token != -100]) == "it is. 2"


@pytest.mark.parametrize("packing, only_text", [(False, True), (True, False)])
def test_the_usual_script(tmp_path, packing, only_text):
    tokenizer = get_chat_template(
        tiny_tokenizer(chat_template=False),
        chat_template="chatml",
        mapping={"role": "from", "content": "value", "user": "human", "assistant": "gpt"},
        map_eos_token=True,
    )
    assert tokenizer.eos_token == "<|im_end|>"

    def render(rows):
        return {
            "text": [
                tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
                for chat in rows["conversations"]
            ]
        }

    data = standardize_sharegpt(Dataset.from_list(SHAREGPT)).map(render, batched=True)
    if only_text:
        data = data.select_columns(["text"])
    model = tiny_model("llama")
    run = SFTTrainer(
        model=model,
        args=settings(tmp_path, packing=packing, max_length=400, max_steps=2),
        train_dataset=data,
        processing_class=tokenizer,
    )
    assert train_on_responses_only(run) is run
    found = sorted(text for row in run.train_dataset for text in trained_texts(row))
    assert found == sorted([f"first {i}<|im_end|>" for i in range(4)] + ["second<|im_end|>"] * 4)
    run.train()
    assert all(loss > 0 for loss in losses(run))


def test_what_a_tool_says_is_not_trained_on_and_the_call_is(tmp_path):
    tokenizer = get_chat_template(tiny_tokenizer(chat_template=False), "qwen-2.5")
    run = SFTTrainer(
        model=tiny_model("llama"),
        args=settings(tmp_path),
        train_dataset=[TOOLS] * 2,
        processing_class=tokenizer,
    )
    train_on_responses_only(run)
    assert trained_texts(run.train_dataset[0]) == [
        '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>', "It is sunny.<|im_end|>",
    ]  # fmt: skip
