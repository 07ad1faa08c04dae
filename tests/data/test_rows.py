"""Every kind of row renders to the text it should, and the labels decode to exactly what is trained on."""

from __future__ import annotations

import pytest

from pronghorn.data.rows import RowFormat, RowRenderer, as_message, row_kind, supervised
from pronghorn.data.templates import ChatRenderer
from pronghorn.errors import ChatTemplateOpaque, RowInvalid, TokenizerProblem
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye?"},
    {"role": "assistant", "content": "Bye."},
]
GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>\n{% else %}{{ message['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3's: only the last turn shows its (empty) reasoning, so a shorter conversation is no prefix of a longer one.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Llama 2's: the answer is stripped, roles have no marker of their own, and the turn ends with EOS.
BRACKETS = (
    "{{ '<|begin|>' }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' <|end|>' }}{% endif %}"
    "{% endfor %}"
)


def trained_text(tokenizer, rendered) -> list[str]:
    """The stretches of supervised tokens, decoded."""
    stretches, current = [], []
    for label in [*rendered["labels"], -100]:
        if label != -100:
            current.append(label)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return stretches


def render(row, tokenizer=None, **form):
    tokenizer = tokenizer or tiny_tokenizer()
    rendered = RowRenderer(tokenizer, RowFormat(**form))(row)
    return tokenizer.decode(rendered["input_ids"]), trained_text(tokenizer, rendered), rendered


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# Like Phi-3's: turns end alike, but the last one is followed by a token that begins like the next turn's.
ENDED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|end|>{% endif %}"
)

FULL = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    "Hello.<|im_end|>\n<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>\n"
)


def test_chat_trains_on_everything_by_default():
    text, trained, _ = render({"messages": CHAT})
    assert text == FULL
    assert trained == [FULL]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION], ids=["compared", "generation"])
def test_responses_only_trains_on_answers_and_their_end(template):
    text, trained, _ = render({"messages": CHAT}, tokenizer_with(template), responses_only=True)
    assert text == FULL
    assert trained == ["Hello.<|im_end|>", "Bye.<|im_end|>"]


def test_responses_only_where_a_shorter_conversation_is_no_prefix():
    text, trained, _ = render({"messages": CHAT}, tokenizer_with(THINKING), responses_only=True)
    assert text.count("<think>") == 1
    assert trained == ["Hello.<|im_end|>", "<think></think>Bye.<|im_end|>"]


def test_responses_only_with_a_bracket_template():
    _, trained, _ = render({"messages": CHAT[1:]}, tokenizer_with(BRACKETS), responses_only=True)
    assert [text.strip() for text in trained] == ["Hello. <|end|>", "Bye. <|end|>"]


def test_responses_only_where_only_the_last_turn_ends_the_text():
    _, trained, _ = render({"messages": CHAT}, tokenizer_with(ENDED), responses_only=True)
    assert trained == ["Hello.<|im_end|>", "Bye.<|im_end|>\n<|end|>"]


def test_responses_only_where_the_last_turn_ends_differently():
    template = CHAT_TEMPLATE.replace("<|im_end|>", "{{ '<|end|>' if loop.last else '<|im_end|>' }}")
    _, trained, _ = render({"messages": CHAT}, tokenizer_with(template), responses_only=True)
    assert trained == ["Hello.<|im_end|>", "Bye.<|end|>"]


def test_responses_only_where_the_next_turn_is_the_end():
    """Like GLM's: an answer has no end of its own and stops where the next turn begins."""
    template = CHAT_TEMPLATE.replace("<|im_end|>\n", "\n")
    text, trained, _ = render({"messages": CHAT}, tokenizer_with(template), responses_only=True)
    assert "<|im_end|>" not in text
    assert trained == ["Hello.\n<|im_start|>", "Bye."]


def test_generation_blocks_that_hold_the_end_are_left_as_they_are():
    inside = GENERATION.replace("{% endgeneration %}<|im_end|>\n", "<|im_end|>\n{% endgeneration %}")
    _, trained, _ = render({"messages": CHAT}, tokenizer_with(inside), responses_only=True)
    assert trained == ["Hello.<|im_end|>\n", "Bye.<|im_end|>\n"]


def test_a_conversation_that_the_template_refuses():
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    with pytest.raises(RowInvalid, match="no system role"):
        render({"messages": CHAT}, tokenizer_with(template))


def test_responses_only_ending_with_a_question():
    _, trained, _ = render({"messages": CHAT[:4]}, responses_only=True)
    assert trained == ["Hello.<|im_end|>"]


@pytest.mark.parametrize(
    "answer", ["user\n", "<|im_end|>", "pronghorn", "Ж", "\n\n", "Hi?", "a\u0301 €"], ids=repr
)
def test_spans_hold_for_awkward_answers(answer):
    messages = [
        CHAT[1],
        {"role": "assistant", "content": answer},
        CHAT[3],
        {"role": "assistant", "content": answer},
    ]
    for template in (CHAT_TEMPLATE, THINKING):
        renderer = ChatRenderer(tokenizer_with(template))
        text = renderer.text(messages)
        for start, end in renderer.assistant_spans(messages, text):
            assert text[start:end].removeprefix("<think></think>") == answer + "<|im_end|>"


def test_a_template_that_hides_answers_is_named():
    hiding = "{% for message in messages %}{{ message['content'] | upper }}{{ loop.length }}\n{% endfor %}"
    with pytest.raises(ChatTemplateOpaque, match=r"PH303.*message 2"):
        render({"messages": CHAT[1:4]}, tokenizer_with(hiding), responses_only=True)


def test_chat_without_template_names_the_fix():
    with pytest.raises(TokenizerProblem, match=r"PH104.*formatting_func"):
        render({"messages": CHAT}, tiny_tokenizer(chat_template=False))


def test_sharegpt_rows_are_chat():
    row = {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}
    text, trained, _ = render(row, responses_only=True)
    assert text == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert trained == ["Hello.<|im_end|>"]


def test_columns_that_are_none_do_not_count():
    text, _, _ = render({"messages": None, "text": "plain"})
    assert text == "plain<|end|>"


def test_prompt_completion_text():
    text, trained, _ = render({"prompt": "2+2=", "completion": " four"})
    assert text == "2+2= four<|end|>"
    assert trained == [" four<|end|>"]
    _, trained, _ = render({"prompt": "2+2=", "completion": " four"}, completion_only=False)
    assert trained == ["2+2= four<|end|>"]


def test_prompt_completion_messages():
    row = {"prompt": CHAT[:2], "completion": [CHAT[2]]}
    text, trained, _ = render(row)
    assert text.startswith("<|im_start|>system\nBe brief.")
    assert [t.strip() for t in trained] == ["Hello.<|im_end|>"]


def test_alpaca_with_a_chat_template():
    row = {"instruction": "Translate.", "input": "Ja", "output": "Yes"}
    text, trained, _ = render(row)
    assert text == "<|im_start|>user\nTranslate.\n\nJa<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    assert [t.strip() for t in trained] == ["Yes<|im_end|>"]
    _, trained, _ = render(row, responses_only=True)
    assert trained == ["Yes<|im_end|>"]


def test_alpaca_without_a_chat_template():
    text, trained, _ = render(
        {"instruction": "Translate.", "input": "", "output": "Yes"}, tiny_tokenizer(chat_template=False)
    )
    assert "### Instruction:\nTranslate.\n\n### Response:\nYes<|end|>" in text
    assert "### Input" not in text
    assert trained == ["Yes<|end|>"]


def test_text_ends_once():
    assert render({"text": "one"})[0] == "one<|end|>"
    assert render({"text": "one<|end|>"})[0] == "one<|end|>"
    assert render({"body": "one"}, text_field="body")[0] == "one<|end|>"


def test_token_rows():
    ids = [5, 6, 7]
    assert render({"input_ids": ids})[2]["labels"] == ids
    assert render({"input_ids": ids, "labels": [-100, 6, 7]})[2]["labels"] == [-100, 6, 7]
    assert render({"input_ids": ids, "assistant_masks": [0, 0, 1]})[2]["labels"] == [-100, -100, 7]
    assert render({"input_ids": ids, "completion_mask": [0, 1, 1]})[2]["labels"] == [-100, 6, 7]
    with pytest.raises(RowInvalid, match="3 input_ids and 2 labels"):
        render({"input_ids": ids, "labels": [1, 2]})


def test_padding_in_token_rows_goes():
    """Rows of `tokenizer(text, padding="max_length")`: nothing is learned from their padding."""
    row = {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]}
    assert render(row)[2] == {"input_ids": [5, 6], "labels": [5, 6]}
    assert render({**row, "labels": [-100, -100, -100, 6]})[2] == {"input_ids": [5, 6], "labels": [-100, 6]}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"input_ids": [5, -1]}, "input_ids holds -1"),
        ({"input_ids": [5, 320]}, "holds 320 .* tokens 0 to 319"),
        ({"input_ids": [5, 6], "labels": [5, 999]}, "labels holds 999"),
        ({"input_ids": [5, 6], "labels": [5, -7]}, "labels holds -7"),
        ({"input_ids": "abc"}, "no list of whole numbers"),
        ({"input_ids": [[5, 6]]}, "no list of whole numbers"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "'attention_mask' has 1 values"),
    ],
)
def test_broken_token_rows(row, message):
    with pytest.raises(RowInvalid, match=message):
        render(row, vocabulary=320)


def test_content_in_parts_is_text():
    """A template for plain text would print the Python list of parts."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert as_message({"role": "user", "content": parts}) == {"role": "user", "content": "ab"}
    with pytest.raises(RowInvalid, match="type 'image'"):
        as_message({"role": "user", "content": [{"type": "image", "text": None}, *parts]})


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "?"}, "'question'"),
        ({"messages": []}, "empty"),
        ({"messages": [{"content": "x"}]}, "no role"),
        ({"messages": [{"role": "user"}]}, "no content"),
        ({"messages": ["hello"]}, "str"),
        ({"prompt": 3, "completion": "x"}, "int"),
    ],
)
def test_malformed_rows(row, message):
    with pytest.raises(RowInvalid, match=message):
        render(row)


def test_kinds():
    assert row_kind({"text": "x", "messages": [{}]}) == "chat"
    assert row_kind({"instruction": "x", "output": "y"}) == "alpaca"
    assert row_kind({"instruction": "x", "output": "y", "text": "z"}) == "text"
    assert row_kind({"other": 1}) is None


def test_tools_and_template_variables_reach_the_template():
    template = "{% if tools %}{{ tools[0]['name'] }}|{% endif %}{% if loud %}LOUD|{% endif %}" + CHAT_TEMPLATE
    row = {"messages": CHAT[1:3], "tools": '[{"name": "clock"}]', "chat_template_kwargs": {"loud": True}}
    assert render(row, tokenizer_with(template))[0].startswith("clock|LOUD|<|im_start|>user")


def test_supervised_skips_the_first_position():
    assert supervised([7, -100, 8]) == 1
    assert supervised([7]) == 0
    assert supervised([]) == 0
