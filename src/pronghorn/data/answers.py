"""The assistant's part of rows that are tokens already, by what a chat template writes around its answers.

Small conversations are rendered, and the template's own spans in them show what stands before an answer and what ends
it. Both are then looked for in the rows. Everything is compared as the text that the tokens stand for, so a newline
that merges with an answer's first letter, or a word that gets another token after a space, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pronghorn.data.templates import ChatRenderer, Message
from pronghorn.errors import ChatTemplateOpaque, PronghornError

_QUESTION, _ANSWER, _OTHER = "Qx{}zq", "Ax{}zq", "Ox{}zq"
_CALLED = "Cxzq"
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"up": _CALLED}}}


class TokenTexts:
    """The text that each token stands for. Those of a row put together are the row's text; half a letter is U+FFFD."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._known: dict[int, str] = {}
        self._before = len(self._decoded(self._anchor))

    def __call__(self, ids: Sequence[int]) -> list[str]:
        return [self._text(token) for token in ids]

    def _text(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self.together([token])
        return self._known[token]

    def together(self, ids: Sequence[int]) -> str:
        """The text of several tokens, letters that are made of more than one whole. Decoded behind another token, since
        a first one loses its space."""
        return self._decoded([*self._anchor, *ids])[self._before :]

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class AnswerMarks:
    """What a chat template writes before an answer, what ends it, and what begins the next question."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    questions: tuple[str, ...]


class AnswerFinder:
    """For each token of a document whether the assistant wrote it."""

    def __init__(self, tokenizer: Any, marks: AnswerMarks) -> None:
        self.marks = marks
        self._texts = TokenTexts(tokenizer)

    def __call__(self, ids: Sequence[int]) -> list[bool]:
        texts = self._texts(ids)
        spans = self._spans("".join(texts))
        kept, position, current = [], 0, 0
        for text in texts:
            end = position + len(text)
            while current < len(spans) and spans[current][1] <= position:
                current += 1
            inside = current < len(spans) and position < spans[current][1]
            kept.append(inside and (end > spans[current][0] or (not text and position >= spans[current][0])))
            position = end
        return kept

    def _spans(self, text: str) -> list[tuple[int, int]]:
        spans, position = [], 0
        while (opening := _first(text, self.marks.openings, position)) is not None:
            start = opening[1]
            closing = _first(text, self.marks.closings, start)
            if closing is None:
                question = _first(text, self.marks.questions, start)
                end = question[0] if question else len(text)
            else:
                end = closing[1]
            spans.append((start, end))
            position = end
        return spans


def answer_finder(tokenizer: Any) -> AnswerFinder:
    """Finds the answers in rows rendered with the tokenizer's chat template.

    Raises:
        TokenizerProblem: there is no chat template.
        ChatTemplateOpaque: nothing in it tells an answer from the rest.
    """
    return AnswerFinder(tokenizer, answer_marks(tokenizer))


def answer_marks(tokenizer: Any) -> AnswerMarks:
    """The marks around answers, from the template's own spans in small conversations; see `answer_finder`."""
    renderer = ChatRenderer(tokenizer)
    question, answer = _message("user", _QUESTION, 1), _message("assistant", _ANSWER, 1)
    more = [_message("user", _QUESTION, 2), _message("assistant", _ANSWER, 2)]
    call = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    marks = _Marks(renderer)
    marks.read([question, answer, *more])
    for messages in (
        [_message("system", _OTHER, 1), question, answer, *more],
        [question, call, _message("tool", _OTHER, 2), answer, *more],
    ):
        with suppress(PronghornError):  # a format may have no place for a system message or tools
            marks.read(messages)
    if not marks.openings or not (marks.closings or marks.questions):
        raise ChatTemplateOpaque(
            "the chat template writes nothing around answers that would show them in rows of tokens",
            where=str(getattr(tokenizer, "name_or_path", "") or "chat template"),
            fix="give instruction_part and response_part, or chat rows with assistant_only_loss=True",
        )
    return AnswerMarks(*(tuple(sorted(found)) for found in (marks.openings, marks.closings, marks.questions)))


def _message(role: str, content: str, number: int) -> Message:
    return {"role": role, "content": content.format(number)}


class _Marks:
    """Collects the marks that conversations show."""

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer
        self._texts = TokenTexts(renderer.tokenizer)
        self.openings: set[str] = set()
        self.closings: set[str] = set()
        self.questions: set[str] = set()

    def read(self, messages: list[Message]) -> None:
        prompt = _generation_prompt(self._renderer, messages)
        ids, mask = self._renderer.assistant_mask(messages)
        pieces = self._texts(ids)
        text = "".join(pieces)
        # Where contents lie, and whether an answer is what lies there.
        contents = [(str(m["content"]), m["role"] == "assistant") for m in messages if m["content"]]
        contents.append((_CALLED, False))
        places = sorted(
            (text.find(c), text.find(c) + len(c), is_answer) for c, is_answer in contents if c in text
        )
        for start, end in _stretches(pieces, mask):
            before = max((stop for _, stop, _ in places if stop <= start), default=0)
            between = text[before:start]
            self.openings.add(_shared(between, prompt) or between.lstrip())
            said = [stop for begin, stop, is_answer in places if start <= begin and stop <= end and is_answer]
            self.closings.update(text[stop:end].strip() for stop in said)
            following = min((begin for begin, _, _ in places if begin >= end), default=end)
            self.questions.add(text[end:following].strip())
        for found in (self.openings, self.closings, self.questions):
            found -= {mark for mark in found if not mark.strip()}


def _generation_prompt(renderer: ChatRenderer, messages: list[Message]) -> str:
    """What the template writes where the first answer is to follow; empty where it writes nothing."""
    until = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    asked, content = renderer.text(messages[:until], ask=True), str(messages[until - 1]["content"])
    unasked = renderer.text(messages[:until])
    if asked.startswith(unasked):
        prompt = asked[len(unasked) :]
    else:  # Phi-3 ends what asks nothing
        prompt = asked[asked.index(content) + len(content) :]
    return prompt if prompt.strip() else ""


def _shared(between: str, prompt: str) -> str:
    """The longest end of one text that the other begins with; the prompt may go on with an empty thought."""
    for length in range(len(prompt), 0, -1):
        if between.endswith(prompt[:length]):
            return prompt[:length] if prompt[:length].strip() else ""
    return ""


def _stretches(pieces: list[str], mask: list[bool]) -> list[tuple[int, int]]:
    """Where runs of supervised tokens begin and end in the text."""
    found: list[tuple[int, int]] = []
    position, start = 0, None
    for piece, inside in zip([*pieces, ""], [*mask, False], strict=True):
        if inside and start is None:
            start = position
        elif not inside and start is not None:
            found.append((start, position))
            start = None
        position += len(piece)
    return found


def _first(text: str, marks: Sequence[str], position: int) -> tuple[int, int] | None:
    """Where the first of the marks begins and ends; the longest of those that begin there."""
    found = [(at, -(at + len(mark))) for mark in marks if (at := text.find(mark, position)) >= 0]
    if not found:
        return None
    at, end = min(found)
    return at, -end
