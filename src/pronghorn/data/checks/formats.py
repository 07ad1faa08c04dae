"""The formats of rows: which one a row has, and what is wrong with it as one of its format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pronghorn.data.reading import Problem, parse
from pronghorn.data.rows import CHAT_COLUMNS, ROLES, template_arguments_of, tools_of
from pronghorn.data.tokens import token_row
from pronghorn.errors import RowInvalid, nearest
from pronghorn.pages import visible

Format = Literal["messages", "sharegpt", "prompt-completion", "preference", "alpaca", "text", "tokens"]

#: What a reader knows them by.
NAMES: dict[str, str] = {
    "messages": "messages (ChatML)",
    "sharegpt": "ShareGPT",
    "prompt-completion": "prompt/completion",
    "preference": "preference pairs",
    "alpaca": "Alpaca",
    "text": "plain text",
    "tokens": "tokens",
}

_encode = json.JSONEncoder(sort_keys=True, default=str).encode

KNOWN_ROLES = {"user", "assistant", "system", "developer", "tool", *ROLES}
_OPENING_ROLES = ("system", "developer")
#: role -> roles that may stand before it; None: the beginning of the conversation (system messages aside).
_AFTER: dict[str, tuple[str | None, ...]] = {
    "user": (None, "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def format_of(row: Mapping[str, Any], text_field: str = "text") -> Format | None:
    """The format of a row, by the columns that hold something, else by those that are there; None for none known."""
    if None not in row.values():
        return _format_by(row, row, text_field)
    filled = {key: value for key, value in row.items() if value is not None}
    return _format_by(filled, row, text_field) or _format_by(row, row, text_field)


def _format_by(columns: Mapping[str, Any], row: Mapping[str, Any], text_field: str) -> Format | None:
    if "input_ids" in columns:
        return "tokens"
    if "chosen" in columns and "rejected" in columns:
        return "preference"
    for chat in CHAT_COLUMNS:
        if chat in columns:
            return _chat_format(chat, row[chat])
    if "prompt" in columns and "completion" in columns:
        return "prompt-completion"
    if text_field in columns:
        return "text"
    if "instruction" in columns and ("output" in columns or "response" in columns):
        return "alpaca"
    if "chosen" in columns or "rejected" in columns:
        return "preference"
    if "completion" in columns:
        return "prompt-completion"
    return "alpaca" if "instruction" in columns else None


def _chat_format(column: str, value: Any) -> Format:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, Mapping) and ("from" in first or "role" in first):
        return "sharegpt" if "from" in first else "messages"
    return "messages" if column == "messages" else "sharegpt"


def problems_of(row: Any, format: Format | None, text_field: str = "text") -> list[Problem]:
    """What is wrong with a row that should be of `format`; `None`: of no known one."""
    if not isinstance(row, Mapping):
        return [Problem("not-a-row", f"this is {_type(row)}, not an object with columns")]
    if format is None:
        return [_of_no_format(row, text_field)]
    if format in ("messages", "sharegpt"):
        return [*_chat_problems(row), *_argument_problems(row)]
    if format == "text":
        return _text_problems(row, text_field)
    if format == "alpaca":
        return _alpaca_problems(row)
    if format == "tokens":
        return _token_problems(row)
    if format == "preference":
        return _preference_problems(row)
    return _pair_problems(row)


def _of_no_format(row: Mapping[str, Any], text_field: str) -> Problem:
    for key, value in row.items():
        if (
            isinstance(value, list)
            and value
            and isinstance(value[0], Mapping)
            and format_of(value[0], text_field)
        ):
            return Problem(
                "nested-rows", f"the rows are {len(value)} objects inside '{visible(key)}'", visible(key)
            )
    columns = ", ".join(f"'{visible(key, 30)}'" for key in list(row)[:12]) or "none"
    return Problem("unknown-format", f"the columns are {columns}")


def _argument_problems(row: Mapping[str, Any]) -> list[Problem]:
    """Of what a row gives the chat template besides the messages."""
    problems = []
    for name, read in (("tools", tools_of), ("chat_template_kwargs", template_arguments_of)):
        if row.get(name):
            try:
                read(row)
            except RowInvalid as error:
                problems.append(Problem("wrong-type", error.message, name))
    return problems


def _chat_problems(row: Mapping[str, Any]) -> list[Problem]:
    for name in CHAT_COLUMNS:
        value = row.get(name)
        if isinstance(value, list):
            return message_problems(value, name)
    name = next((name for name in CHAT_COLUMNS if name in row), "messages")
    value = row.get(name)
    if isinstance(value, str) and list_in_text(value) is not None:
        return [Problem("json-in-text", f"'{name}' holds the messages as text", name)]
    if name not in row or value is None:
        return [Problem("missing-field", f"'{name}' is missing", name)]
    return [Problem("wrong-type", f"'{name}' is {_type(value)}, not a list of messages", name)]


def list_in_text(text: str) -> list[Any] | None:
    """The list that a text holds as JSON; None when it holds none."""
    if not text.lstrip().startswith("["):
        return None
    parsed = parse(text.encode("utf-8", "surrogatepass"))
    value = parsed.values[0] if len(parsed.values) == 1 else None
    return value if isinstance(value, list) else None


def message_problems(messages: list[Any], field: str, *, whole: bool = True) -> list[Problem]:
    """What is wrong with a conversation, or with a part of one that need not begin with a question and be answered."""
    if not messages:
        return [Problem("empty-field", f"'{field}' holds no messages", field)]
    problems: list[Problem] = []
    roles: list[str] = []
    for index, message in enumerate(messages):
        if type(message) is not dict:
            problems.append(
                Problem("wrong-type", f"message {index + 1} is {_type(message)}", f"{field}[{index}]")
            )
            continue
        role = message.get("role") or message.get("from")
        if type(role) is not str:
            problems.append(_without_role(message, f"{field}[{index}]"))
            continue
        if role not in KNOWN_ROLES:
            problems.append(_unknown_role(role, f"{field}[{index}]"))
        role = ROLES.get(role, role)
        roles.append(role)
        content = message["content"] if message.get("content") is not None else message.get("value")
        if type(content) is not str or not content or content.isspace():
            problems += _content_problems(message, role, content, f"{field}[{index}]")
    if len(roles) == len(messages):
        problems += _order_problems(roles, field, whole)
    return problems


def _without_role(message: Mapping[str, Any], field: str) -> Problem:
    for key in ("role", "from"):
        if message.get(key) is not None:
            return Problem("wrong-type", f"the role is {_type(message[key])}, not text", f"{field}.{key}")
    return Problem("missing-field", "a message has no role", f"{field}.role")


def _unknown_role(role: str, field: str) -> Problem:
    hint = nearest(role.lower(), sorted(KNOWN_ROLES))
    return Problem(
        "unknown-role", f"no known role: '{visible(role, 30)}'" + (f"; {hint}" if hint else ""), field
    )


def _content_problems(message: Mapping[str, Any], role: str, content: Any, field: str) -> list[Problem]:
    """Of a message whose content is no text with something in it."""
    key = "value" if "value" in message and "content" not in message else "content"
    extra = any(v is not None for k, v in message.items() if k not in ("role", "from", "content", "value"))
    if content is None:
        return [] if extra else [Problem("missing-field", "a message has no content", f"{field}.{key}")]
    if isinstance(content, list):
        return _part_problems(content, f"{field}.{key}")
    if not isinstance(content, str):
        return [Problem("wrong-type", f"the content is {_type(content)}, not text", f"{field}.{key}")]
    if extra or role in ("system", "developer", "tool"):
        return []
    return [Problem("empty-field", f"the {visible(role, 30)}'s message is empty", f"{field}.{key}")]


def _part_problems(parts: list[Any], field: str) -> list[Problem]:
    for index, part in enumerate(parts):
        kind = part.get("type") or "text" if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            return [
                Problem(
                    "wrong-type", f"a part of type '{visible(str(kind), 30)}' is no text", f"{field}[{index}]"
                )
            ]
    return [] if parts else [Problem("empty-field", "the content has no parts", field)]


def _order_problems(roles: list[str], field: str, whole: bool) -> list[Problem]:
    problems = []
    if not all(role in _AFTER or role in _OPENING_ROLES for role in roles):
        return [] if "assistant" in roles or not whole else [_no_answer(field)]
    before: str | None = None
    for index, role in enumerate(roles):
        if role in _OPENING_ROLES and before is None:
            continue
        allowed = _AFTER.get(role, ()) if role not in _OPENING_ROLES else ()
        partial = not whole and before is None
        if before not in allowed and not partial:
            where = f"after {before}" if before else "at the beginning"
            problems.append(Problem("role-order", f"{role} {where}", f"{field}[{index}]"))
            break
        before = role
    if not whole:
        return problems
    if "assistant" not in roles:
        problems.append(_no_answer(field))
    elif roles[-1] != "assistant" and not problems:
        problems.append(
            Problem("role-order", f"the last message is the {roles[-1]}'s: nothing answers it", field)
        )
    return problems


def _no_answer(field: str) -> Problem:
    return Problem("no-answer", "the conversation has no assistant's message", field)


def _text_problems(
    row: Mapping[str, Any], name: str, *, optional: bool = False, numbers: bool = False
) -> list[Problem]:
    """Of a column that must hold text with something in it; `optional`: or none; `numbers`: or one."""
    value = row.get(name)
    if numbers and isinstance(value, int | float):
        return []
    if isinstance(value, str):
        empty = not optional and (not value or value.isspace())
        return [Problem("empty-field", f"'{name}' is empty", name)] if empty else []
    if value is None:
        return [] if optional else [Problem("missing-field", f"'{name}' is missing", name)]
    return [Problem("wrong-type", f"'{name}' is {_type(value)}, not text", name)]


def _alpaca_problems(row: Mapping[str, Any]) -> list[Problem]:
    question, given, answer = row.get("instruction"), row.get("input"), row.get("output")
    if type(question) is str and type(given) is str and type(answer) is str:
        sound = question and answer and not question.isspace() and not answer.isspace()
        if sound and row.get("system") is None:  # the most frequent case
            return []
    name = "response" if answer is None and row.get("response") is not None else "output"
    return [
        *_text_problems(row, "instruction", numbers=True),
        *_text_problems(row, "input", optional=True, numbers=True),
        *_text_problems(row, name, numbers=True),
        *_text_problems(row, "system", optional=True, numbers=True),
    ]


def _token_problems(row: Mapping[str, Any]) -> list[Problem]:
    try:
        columns = token_row(row)
    except (RowInvalid, KeyError, TypeError) as error:
        said = error.message if isinstance(error, RowInvalid) else str(error)
        return [Problem("wrong-type", said, "input_ids")]
    if not columns["input_ids"]:
        return [Problem("empty-field", "the row has no tokens", "input_ids")]
    if all(label == -100 for label in columns["labels"][1:]):
        return [Problem("no-answer", "no label counts", "labels")]
    return []


def _pair_problems(row: Mapping[str, Any]) -> list[Problem]:
    return [*_prompt_problems(row), *_answer_problems(row, "completion"), *_argument_problems(row)]


def _prompt_problems(row: Mapping[str, Any], *, optional: bool = False) -> list[Problem]:
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return message_problems(prompt, "prompt", whole=False)
    problems = _text_problems(row, "prompt", optional=optional)
    if problems and problems[0].kind == "empty-field":
        return [Problem("empty-prompt", "'prompt' is empty", "prompt")]
    return problems


def _answer_problems(row: Mapping[str, Any], name: str) -> list[Problem]:
    value = row.get(name)
    if not isinstance(value, list):
        return _text_problems(row, name)
    problems = message_problems(value, name, whole=False)
    roles = {
        ROLES.get(turn.get("role") or turn.get("from"), turn.get("role")) for turn in value if not problems
    }
    return problems if problems or "assistant" in roles else [_no_answer(name)]


def _preference_problems(row: Mapping[str, Any]) -> list[Problem]:
    problems = [*_prompt_problems(row, optional=True)]
    for name in ("chosen", "rejected"):
        problems += _answer_problems(row, name)
    if not problems and row["chosen"] == row["rejected"]:
        problems.append(Problem("same-answers", "'chosen' and 'rejected' are the same", "rejected"))
    return problems


def texts_of(row: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """(field, text) of every text in a row, however deep it stands (to 20 levels)."""
    if isinstance(row, str):
        yield field, row
    elif field.count(".") + field.count("[") < 20:
        if isinstance(row, Mapping):
            for key, value in row.items():
                name = key if type(key) is str and key.isidentifier() else visible(str(key), 40)
                yield from texts_of(value, f"{field}.{name}" if field else name)
        elif isinstance(row, list):
            for index, value in enumerate(row):
                yield from texts_of(value, f"{field}[{index}]")


def trained_content(row: Mapping[str, Any], format: Format | None, text_field: str = "text") -> Any:
    """What a row teaches: its format's columns, roles by their common names; two rows with the same are duplicates."""
    if format in ("messages", "sharegpt"):
        return [_conversation(row), row.get("tools")]
    if format == "text":
        return row.get(text_field)
    if format == "alpaca":
        answer = row.get("output") if row.get("output") is not None else row.get("response")
        return [row.get("system") or "", row.get("instruction"), row.get("input") or "", answer]
    if format in ("prompt-completion", "preference"):
        names = (
            ("prompt", "completion") if format == "prompt-completion" else ("prompt", "chosen", "rejected")
        )
        return [_plain_messages(row.get(name)) for name in names]
    if format == "tokens":
        return [row.get("input_ids"), row.get("labels")]
    return dict(row)


def question_of(row: Mapping[str, Any], format: Format | None) -> Any:
    """What a row asks, None where it asks nothing: the same question in two files lets one answer for the other."""
    if format in ("messages", "sharegpt"):
        asked: list[Any] = []
        for message in _conversation(row) or []:
            if message[0] == "assistant":
                return asked or None
            asked += [message] if message[0] == "user" else []
        return None
    if format == "alpaca":
        return [row.get("instruction"), row.get("input") or ""]
    if format in ("prompt-completion", "preference"):
        return _plain_messages(row.get("prompt"))
    return None


def _conversation(row: Mapping[str, Any]) -> Any:
    value = next((row[name] for name in CHAT_COLUMNS if row.get(name) is not None), None)
    return _plain_messages(value)


def _plain_messages(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [_plain_message(message) if isinstance(message, Mapping) else [None, message] for message in value]


def _plain_message(message: Mapping[str, Any]) -> list[Any]:
    role = message.get("role") or message.get("from")
    content = message["content"] if message.get("content") is not None else message.get("value")
    rest = {
        k: v for k, v in message.items() if k not in ("role", "from", "content", "value") and v is not None
    }
    return [ROLES.get(role, role) if isinstance(role, str) else role, content, *([rest] if rest else [])]


def canonical(content: Any) -> bytes:
    """JSON of any value, the same for equal ones."""
    return _encode(content).encode()


def _type(value: Any) -> str:
    """What a person calls the type of a value."""
    if value is None:
        return "empty (null)"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
