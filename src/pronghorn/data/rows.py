"""One dataset row to tokens and labels: chat, prompt/completion, Alpaca and plain-text rows.

Labels are not shifted (Transformers' convention): ``labels[t]`` is the token at position t, or -100 where it is not
trained on. The model predicts it from position t - 1, so the first token of a row never counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pronghorn.data.templates import ChatRenderer, Message
from pronghorn.data.tokens import IGNORED, check_known, labels_where, token_row
from pronghorn.errors import RowInvalid

RowKind = Literal["tokens", "chat", "prompt_completion", "alpaca", "text"]

#: Other names of roles in use.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
CHAT_COLUMNS = ("messages", "conversations", "conversation")
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


@dataclass(frozen=True)
class RowFormat:
    """How rows are read, the same for every row of a data set.

    Args:
        text_field: column of plain text.
        responses_only: train on the assistant's turns only (chat rows, and messages in prompt/completion rows).
        completion_only: train on the completion only; None does so for prompt/completion and Alpaca rows.
        vocabulary: tokens that the model embeds, where known; a row with another one is refused.
    """

    text_field: str = "text"
    responses_only: bool = False
    completion_only: bool | None = None
    vocabulary: int | None = None


def row_kind(row: Mapping[str, Any], text_field: str = "text") -> RowKind | None:
    """What a row is, by its columns; None when it is nothing known. Chat columns win over text, tokens over all."""
    if row.get("input_ids") is not None:
        return "tokens"
    if any(isinstance(row.get(name), list) for name in CHAT_COLUMNS):
        return "chat"
    if row.get("prompt") is not None and row.get("completion") is not None:
        return "prompt_completion"
    if isinstance(row.get(text_field), str):
        return "text"
    if row.get("instruction") is not None and (
        row.get("output") is not None or row.get("response") is not None
    ):
        return "alpaca"
    return None


def messages_of(row: Mapping[str, Any]) -> list[Message] | None:
    """A chat row's messages as role/content dictionaries, from `messages` or ShareGPT's from/value."""
    for name in CHAT_COLUMNS:
        if isinstance(row.get(name), list):
            return [as_message(message) for message in row[name]]
    return None


def as_message(message: Any) -> Message:
    """One message as role and content; other keys (tool_calls, …) stay, empty ones go.

    Raises:
        RowInvalid: it has neither role and content nor from and value.
    """
    if not isinstance(message, Mapping):
        raise RowInvalid(f"a message is {type(message).__name__}, not a role with content")
    role = message.get("role") or message.get("from")
    if not isinstance(role, str):
        raise RowInvalid("a message has no role", fix="give each message 'role' and 'content'")
    content = message["content"] if message.get("content") is not None else message.get("value")
    rest = {
        k: v for k, v in message.items() if k not in ("role", "from", "content", "value") and v is not None
    }
    if content is None and not rest:
        raise RowInvalid(
            f"a message of role '{role}' has no content", fix="give each message 'role' and 'content'"
        )
    return {"role": ROLES.get(role, role), "content": "" if content is None else _plain(content), **rest}


def _plain(content: Any) -> Any:
    """Parts of text as one text: a template for plain text would print the list of parts itself.

    Raises:
        RowInvalid: the content is neither text nor a list of texts.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowInvalid(
            f"a message's content is {type(content).__name__}, not text", fix="give the content as text"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type") or "text" if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise RowInvalid(
                f"a message has a part of type '{kind}' that is no text",
                fix="give the content as text, or as parts {'type': 'text', 'text': ...}",
            )
        texts.append(text)
    return "".join(texts)


def tools_of(row: Mapping[str, Any]) -> list[Any]:
    """The tools that a chat row offers, given as a list or as its JSON.

    Raises:
        RowInvalid: they are something else.
    """
    tools = row.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or []
        except ValueError:
            tools = None
    if not isinstance(tools, list):
        raise RowInvalid("'tools' is no list of tools", fix="give a list, or its JSON as text")
    return tools


def template_arguments_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Further variables that a chat row gives its template.

    Raises:
        RowInvalid: they are no object.
    """
    arguments = row.get("chat_template_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise RowInvalid(
            "'chat_template_kwargs' is no object", fix='give one, such as {"enable_thinking": false}'
        )
    return arguments


def _text_or_number(row: Mapping[str, Any], name: str) -> str:
    """An Alpaca row's column as text; nothing for none.

    Raises:
        RowInvalid: it is neither text nor a number.
    """
    value = row.get(name)
    if value is not None and not isinstance(value, str | int | float):
        raise RowInvalid(f"'{name}' is {type(value).__name__}, not text", fix="give it as text")
    return "" if value is None else str(value)


class RowRenderer:
    """Rows to ``{"input_ids", "labels"}`` with one tokenizer."""

    def __init__(self, tokenizer: Any, form: RowFormat) -> None:
        self.tokenizer, self.form = tokenizer, form
        self.chat = ChatRenderer(tokenizer)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """Token ids and labels of one row.

        Raises:
            RowInvalid: the row is of no known kind, malformed, or has tokens that the model does not.
            TokenizerProblem: a chat row and no chat template.
            ChatTemplateOpaque: the assistant's turns cannot be told from the rest.
        """
        if not isinstance(row, Mapping):
            raise RowInvalid(f"a row is {type(row).__name__}, not columns", fix='give {"text": ...}')
        rendered = self._rendered(row)
        check_known(rendered, self.form.vocabulary, self.tokenizer)
        return rendered

    def _rendered(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        kind = row_kind(row, self.form.text_field)
        if kind == "tokens":
            return token_row(row, self.form.completion_only)
        if kind == "chat":
            return self._chat(row)
        if kind == "prompt_completion":
            return self._prompt_completion(row)
        if kind == "alpaca":
            return self._alpaca(row)
        if kind == "text":
            ids = self._tokens(self._ended(row[self.form.text_field]))
            return {"input_ids": ids, "labels": list(ids)}
        raise _of_no_kind(row, self.form.text_field)

    def _ended(self, text: Any) -> str:
        if not isinstance(text, str):
            raise RowInvalid(f"expected text, got {type(text).__name__}")
        end = self.tokenizer.eos_token
        # A chat template that made the text may have written a newline behind the last turn.
        return text if not end or text.rstrip().endswith(end) else text + end

    def _tokens(self, text: str) -> list[int]:
        """Token ids of a text; one that a chat template has begun with BOS gets no second one."""
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return list(self.tokenizer(text, add_special_tokens=not begun)["input_ids"])

    def chat_for(self, row: Mapping[str, Any]) -> ChatRenderer:
        """The renderer with what the row itself gives the template: tools, and other arguments.

        Raises:
            RowInvalid: these are no list, or no object.
        """
        tools = tools_of(row)
        extra = {k: v for k, v in template_arguments_of(row).items() if v is not None}
        return (
            self.chat.with_arguments(**extra, **({"tools": tools} if tools else {}))
            if extra or tools
            else self.chat
        )

    def _chat(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        messages = messages_of(row)
        if not messages:
            raise RowInvalid("the conversation is empty", fix="leave out rows without messages")
        chat = self.chat_for(row)
        if self.form.responses_only:
            return _labelled(*chat.assistant_mask(messages))
        ids = chat.tokens(chat.text(messages))
        return {"input_ids": ids, "labels": list(ids)}

    def _prompt_completion(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            return self._conversation_pair(row, prompt, completion)
        if not isinstance(prompt, str):
            raise RowInvalid(f"'prompt' is {type(prompt).__name__}, not text or messages")
        return self._text_pair(prompt, completion)

    def _conversation_pair(
        self, row: Mapping[str, Any], prompt: Any, completion: Any
    ) -> dict[str, list[int]]:
        chat = self.chat_for(row)
        before = (
            [as_message(m) for m in prompt]
            if isinstance(prompt, list)
            else [{"role": "user", "content": prompt}]
        )
        after = (
            [as_message(m) for m in completion]
            if isinstance(completion, list)
            else [{"role": "assistant", "content": completion}]
        )
        asked = chat.text(before, ask=True)
        text = chat.text(before + after)
        if self.form.responses_only:
            ids, kept = chat.assistant_mask(before + after)
        else:
            ids = chat.tokens(text)
            kept = [True] * len(ids)
        if self.form.completion_only is not False:
            start = _common_tokens(chat.tokens(asked), ids)
            kept = [bit and i >= start for i, bit in enumerate(kept)]
        return _labelled(ids, kept)

    def _text_pair(self, prompt: str, completion: Any) -> dict[str, list[int]]:
        """The completion starts where the tokens of the prompt and of the whole text part ways."""
        ids = self._tokens(prompt + self._ended(completion))
        if self.form.completion_only is False:
            return {"input_ids": ids, "labels": list(ids)}
        start = _common_tokens(self._tokens(prompt), ids)
        return _labelled(ids, [i >= start for i in range(len(ids))])

    def _alpaca(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """A chat of one question where the tokenizer has a chat template, else Alpaca's own prompt text."""
        instruction, given = _text_or_number(row, "instruction"), _text_or_number(row, "input")
        answer = _text_or_number(row, "output" if row.get("output") is not None else "response")
        told = _text_or_number(row, "system")
        if getattr(self.tokenizer, "chat_template", None):
            question = f"{instruction}\n\n{given}" if given else instruction
            system = [{"role": "system", "content": told}] if told else []
            return self._conversation_pair(row, [*system, {"role": "user", "content": question}], answer)
        prompt = _ALPACA.format(
            paired=", paired with an input that provides further context" if given else "",
            instruction=instruction,
            input=f"### Input:\n{given}\n\n" if given else "",
        )
        return self._text_pair(prompt, answer)


def has_turns(row: Mapping[str, Any], text_field: str = "text") -> bool:
    """Whether answers have to be told from other turns: in a conversation, whole or as the completion of a prompt. A
    completion of one turn is an answer, with what the chat template writes behind it."""
    completion = row.get("completion")
    pair = row_kind(row, text_field) == "prompt_completion" and isinstance(completion, list)
    return len(completion) > 1 if pair else row_kind(row, text_field) == "chat"  # type: ignore[arg-type]


class AnswerRenderer:
    """Rows to ``{"input_ids", "labels"}`` as `pronghorn train` has them with ``data.responses_only``, or without."""

    def __init__(
        self, tokenizer: Any, responses_only: bool, text_field: str = "text", vocabulary: int | None = None
    ) -> None:
        form = RowFormat(text_field, completion_only=None if responses_only else False, vocabulary=vocabulary)
        self.text_field = text_field
        self.whole = RowRenderer(tokenizer, form)
        self._turns = (
            RowRenderer(tokenizer, replace(form, responses_only=True)) if responses_only else self.whole
        )

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """Token ids and labels of one row; raises what `RowRenderer` does."""
        turns = isinstance(row, Mapping) and has_turns(row, self.text_field)
        return (self._turns if turns else self.whole)(row)


def supervised(labels: list[int]) -> int:
    """How many labels count: those not -100, without the first position, which nothing predicts."""
    return sum(label != IGNORED for label in labels[1:])


def _labelled(ids: list[int], kept: list[bool]) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": labels_where(ids, kept)}


def _of_no_kind(row: Mapping[str, Any], text_field: str) -> RowInvalid:
    """What is wrong with a row of no known kind: a known column with something else in it, or no known column."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return RowInvalid(
            "a row is a preference pair ('chosen', 'rejected'), of which SFT learns nothing",
            fix="train with TRL's DPOTrainer or ORPOTrainer, or give 'prompt' and 'completion'",
        )
    expected = {text_field: "text"} | dict.fromkeys(CHAT_COLUMNS, "a list of messages")
    expected |= dict.fromkeys(("prompt", "completion"), "text or messages")
    expected |= dict.fromkeys(("instruction", "output"), "text")
    for name, wanted in expected.items():
        if name in row and not (wanted.startswith("text") and isinstance(row[name], str)):
            found = "empty (null)" if row[name] is None else f"of type {type(row[name]).__name__}"
            fix = "correct the row, or leave it out"
            if isinstance(row[name], str) and row[name].lstrip().startswith(("[", "{")):
                found, fix = (
                    "a list written as text",
                    "`pronghorn data clean IN OUT.jsonl` makes lists of such texts",
                )
            return RowInvalid(f"'{name}' is {found}, not {wanted}", fix=fix)
    columns = ", ".join(f"'{name}'" for name in row) or "none"
    return RowInvalid(
        f"a row with the columns {columns} is of no known kind",
        fix="give 'messages', 'prompt' and 'completion', 'instruction' and 'output', or a text column "
        "(dataset_text_field, data.text_field), or a formatting_func",
    )


def _common_tokens(one: list[int], other: list[int]) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
