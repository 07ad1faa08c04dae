"""Answers found in rows of tokens are those that the template's own spans hold, token by token."""

from __future__ import annotations

import pytest

from pronghorn.data.answers import answer_finder, answer_marks
from pronghorn.data.chat_templates import TEMPLATES
from pronghorn.data.templates import ChatRenderer
from pronghorn.errors import ChatTemplateOpaque, RowInvalid, TokenizerProblem
from tests.data.test_chat_templates import CHAT, TOOLS, TURNS, WITH_TOOLS, with_template
from tests.data.test_rows import BRACKETS, ENDED, GENERATION, THINKING, tokenizer_with
from tests.data.test_templates import FOLDER, PAIRS, VISION
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

AWKWARD = ["", "\nnewline first", "  two spaces ", "user\n", "Ж€ 日本", "a\n\n\nb", "assistant"]


def chats():
    yield from (TURNS, CHAT, CHAT[:3], CHAT[:4])
    for answer in AWKWARD:
        yield [TURNS[0], {"role": "assistant", "content": answer}, *TURNS[2:]]
        yield [*TURNS[:3], {"role": "assistant", "content": answer}]


def check(tokenizer, **arguments) -> int:
    """Every conversation, whole and cut off, has the mask of its spans; returns how many the template takes."""
    renderer, find, count = ChatRenderer(tokenizer, **arguments), answer_finder(tokenizer), 0
    for messages in [*chats(), *([WITH_TOOLS, WITH_TOOLS[:5]] if arguments else [])]:
        try:
            ids, mask = renderer.assistant_mask(messages)
        except RowInvalid:
            continue
        count += 1
        found = find(ids)
        assert found == mask, (
            messages,
            [(tokenizer.decode([i]), a, b) for i, a, b in zip(ids, mask, found, strict=True)],
        )
        for end in (len(ids) // 2, len(ids) - 2):
            assert find(ids[:end]) == mask[:end]
    return count


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates(name):
    assert check(with_template(name)) >= 10
    if TEMPLATES[name].tools:
        assert check(with_template(name), tools=TOOLS) >= 12


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION, THINKING, BRACKETS, ENDED])
def test_templates_of_ones_own(template):
    assert check(tokenizer_with(template)) >= 10


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in VISION])
def test_models_own_templates(name):
    tokenizer = tokenizer_with((FOLDER / f"{name}.jinja").read_text())
    renderer, find = ChatRenderer(tokenizer), answer_finder(tokenizer)
    for messages in (TURNS, CHAT, CHAT[:3], CHAT[:4]):
        try:
            ids, mask = renderer.assistant_mask(messages)
        except RowInvalid:
            continue
        assert find(ids) == mask, (answer_marks(tokenizer), renderer.text(messages))


def test_templates_that_show_nothing():
    with pytest.raises(TokenizerProblem):
        answer_finder(tiny_tokenizer(chat_template=False))
    with pytest.raises(ChatTemplateOpaque, match="instruction_part"):
        answer_finder(tokenizer_with("{% for message in messages %}{{ message['content'] }}{% endfor %}"))
