"""Tables as conversations, and conversations as text, the way that scripts for Ollama make them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pronghorn.data.chat_templates import get_chat_template
from pronghorn.data.rows import CHAT_COLUMNS
from pronghorn.data.sharegpt import standardize_sharegpt
from pronghorn.errors import DatasetUnusable, UnknownArgument

_COLUMN = re.compile(r"\{([^{}]+)\}")
_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_INPUT, _OUTPUT, _SYSTEM = "{INPUT}", "{OUTPUT}", "{SYSTEM}"


@dataclass(frozen=True)
class _Asks:
    """The question that a row's columns make together."""

    prompt: str

    @property
    def columns(self) -> list[str]:
        return _COLUMN.findall(self.prompt)

    def __call__(self, row: Mapping[str, Any]) -> str:
        def part(text: str) -> str:
            return _COLUMN.sub(lambda found: _text(row[found[1]]), text)

        def optional(found: re.Match[str]) -> str:
            empty = any(not _text(row[name]).strip() for name in _COLUMN.findall(found[1]))
            return "" if empty else found[1]

        return part(_OPTIONAL.sub(optional, self.prompt))


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """A table's rows as conversations of `from` and `value`, in a column `conversations`.

    Args:
        merged_prompt: the question, with columns as ``{column}``; what stands in ``[[ ]]`` is left out of rows where a
            column in it is empty. Without it, the column `merged_column_name`.
        output_column_name: the column of answers.
        conversation_extension: questions and answers of a conversation; those after the row's own are of rows drawn
            at random.

    Raises:
        DatasetUnusable: there is no such column.
    """
    ask = _Asks(merged_prompt or f"{{{merged_column_name}}}")
    columns = list(dataset.column_names)
    for name in [*ask.columns, output_column_name]:
        if name not in columns:
            raise DatasetUnusable(
                f"there is no column '{name}'", fix=f"the columns are {', '.join(columns)}: name those"
            )
    turns = [
        [{"from": "human", "value": ask(row)}, {"from": "gpt", "value": _text(row[output_column_name])}]
        for row in dataset
    ]
    orders = [list(range(len(turns)))]
    draw = random.Random(random_state)
    for _ in range(1, conversation_extension):
        orders.append(draw.sample(orders[0], len(turns)))
    conversations = [
        [turn for order in orders for turn in turns[order[place]]] for place in range(len(turns))
    ]
    kept = dataset.remove_columns(
        columns if remove_unused_columns else [c for c in columns if c == "conversations"]
    )
    if remove_unused_columns:
        return type(dataset).from_dict({"conversations": conversations})
    return kept.add_column("conversations", conversations)


def apply_chat_template(
    dataset: Any,
    tokenizer: Any = None,
    chat_template: str | None = None,
    default_system_message: str | None = None,
    extra_eos_tokens: Sequence[str] | None = None,
) -> Any:
    """Conversations as a column `text`, in a format that is shown by example, which becomes the tokenizer's template.

    Args:
        chat_template: such as ``"### Question:\\n{INPUT}\\n\\n### Answer:\\n{OUTPUT}"``. With two questions and answers
            it shows how a conversation goes on; with one, a turn begins after the last empty line before ``{INPUT}``.
            ``{SYSTEM}`` is where a system message goes. None leaves the tokenizer's own template.
        default_system_message: for conversations without one.

    Raises:
        UnknownArgument: the example does not show where questions and answers go.
        ChatTemplateMismatch: it writes tokens that the tokenizer does not have.
    """
    if tokenizer is None:
        raise UnknownArgument("apply_chat_template() needs a tokenizer", fix="give tokenizer=tokenizer")
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if chat_template is not None:
        form = _Form.shown_by(chat_template, inner)
        stop = next((token for token in extra_eos_tokens or () if token in form.end), None)
        get_chat_template(tokenizer, (form.jinja(default_system_message), stop or form.stop(inner)))
    column = next((name for name in CHAT_COLUMNS if name in dataset.column_names), None)
    standard = standardize_sharegpt(dataset)

    def text(row: Mapping[str, Any]) -> dict[str, str]:
        return {"text": inner.apply_chat_template(row[str(column)], tokenize=False)}

    return standard.map(text, desc="Rendering conversations")


def _text(value: Any) -> str:
    return "" if value is None else str(value)


@dataclass(frozen=True)
class _Form:
    """A chat format: `head`, then for each turn `ask` question `reply` answer `end`, with `joint` between turns."""

    head: str
    ask: str
    reply: str
    end: str
    joint: str

    @staticmethod
    def shown_by(example: str, tokenizer: Any) -> _Form:
        counts = example.count(_INPUT), example.count(_OUTPUT)
        if counts not in ((1, 1), (2, 2)) or example.find(_INPUT) > example.find(_OUTPUT):
            raise UnknownArgument(
                f"the chat template has {{INPUT}} {counts[0]} times and {{OUTPUT}} {counts[1]} times",
                fix="write each once or twice, {INPUT} first",
            )
        before, _, rest = example.lstrip().partition(_INPUT)
        reply, _, rest = rest.partition(_OUTPUT)
        if counts == (2, 2):
            gap, _, rest = rest.partition(_INPUT)
            tail = rest.partition(_OUTPUT)[2]
            end = _common(gap, tail)
            gap = gap[len(end) :]
            ask = _common(before[::-1], gap[::-1])[::-1]
            head, joint = before[: len(before) - len(ask)], gap[: len(gap) - len(ask)]
        else:
            head, blank, ask = before.rpartition("\n\n")
            end, joint = rest, ""
            if blank and ask:
                ask = blank + ask
            elif blank or _SYSTEM in before:
                raise UnknownArgument(
                    "the chat template does not show where a turn begins",
                    fix="write it with a second {INPUT} and {OUTPUT}, as a conversation goes on",
                )
        if not any(token in end for token in _specials(tokenizer)):
            end = tokenizer.eos_token + end
        return _Form(head, ask, reply, end, joint)

    def stop(self, tokenizer: Any) -> str:
        """The first control token that ends an answer."""
        found = [(self.end.find(token), token) for token in _specials(tokenizer) if token in self.end]
        return min(found)[1]

    def jinja(self, system: str | None) -> str:
        """The format as a template that marks what the assistant writes."""
        first = "messages[0]['content'] if messages[0]['role'] == 'system' else "
        if _SYSTEM in self.head:
            opening = [*(_quoted(part) for part in self.head.split(_SYSTEM))]
            usual = _quoted(system or "You are a helpful assistant")
            start = f" ~ ({first}{usual}) ~ ".join(opening)
        else:  # the words that it begins with are what a system message takes the place of
            start = f"({first}{_quoted(self.head if system is None else system)})"
        return (
            f"{{{{ {start} }}}}{{% for message in messages %}}{{% if message['role'] == 'user' %}}"
            f"{{{{ ({_quoted('')} if loop.first or (loop.index == 2 and messages[0]['role'] == 'system') else "
            f"{_quoted(self.joint)}) ~ {_quoted(self.ask)} ~ message['content'] }}}}"
            f"{{% elif message['role'] == 'assistant' %}}{{{{ {_quoted(self.reply)} }}}}"
            f"{{% generation %}}{{{{ message['content'] ~ {_quoted(self.end)} }}}}{{% endgeneration %}}"
            f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {_quoted(self.reply)} }}}}{{% endif %}}"
        )


def _specials(tokenizer: Any) -> list[str]:
    return [token for token in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} if token]


def _common(one: str, other: str) -> str:
    """What both begin with."""
    length = next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return one[:length]


def _quoted(text: str) -> str:
    """A text as Jinja writes one."""
    for sign, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r")):
        text = text.replace(sign, escaped)
    return f"'{text}'"
