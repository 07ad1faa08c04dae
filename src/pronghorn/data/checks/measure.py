"""A row as the training will see it: how many tokens, how many of them count, and what the tokenizer makes of it."""

from __future__ import annotations

import os
import re
import signal
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeVar

from pronghorn.data.checks.formats import Format, texts_of, trained_content
from pronghorn.data.reading import Problem
from pronghorn.data.rows import AnswerRenderer, messages_of, supervised
from pronghorn.errors import ChatTemplateOpaque, PronghornError, TokenizerProblem
from pronghorn.pages import visible

Tag = TypeVar("Tag")

#: Roles whose texts a template writes as they are.
_SHOWN = ("system", "user", "assistant")

CHUNK = 64
#: Rows that are measured before other processes are worth their start.
ROWS_ALONE = 512


class Measured(NamedTuple):
    """Tokens of a row; those that count; those that count and survive truncation; what is wrong.

    A row that cannot be rendered has no tokens, and a problem that says why.
    """

    tokens: int
    supervised: int
    kept: int
    problems: tuple[Problem, ...] = ()


class Meter:
    """Measures rows with a tokenizer.

    Args:
        max_length: tokens that training keeps of a row.
        responses_only: only the assistant's turns, or the completion, count.
        thorough: also compare what the template and the tokenizer make of a row with the row.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None = None,
        *,
        responses_only: bool = True,
        text_field: str = "text",
        thorough: bool = False,
    ) -> None:
        self.tokenizer, self.max_length, self.thorough = tokenizer, max_length, thorough
        self.text_field = text_field
        self._render = AnswerRenderer(tokenizer, responses_only, text_field)
        tokens = [str(token) for token in getattr(tokenizer, "all_special_tokens", ())]
        pattern = "|".join(re.escape(token) for token in tokens if len(token) > 2)
        self._special = re.compile(pattern) if pattern else None

    def __call__(self, row: Mapping[str, Any], format: Format | None) -> Measured:
        rows = _as_trained(row) if format == "preference" else [row]
        measured = [self._measure(one, format) for one in rows]
        longest = max(measured, key=lambda one: one.tokens)
        problems = dict.fromkeys(problem for one in measured for problem in one.problems)
        return longest._replace(problems=tuple(problems))

    def _measure(self, row: Mapping[str, Any], format: Format | None) -> Measured:
        try:
            rendered = self._render(row)
            ids, labels = rendered["input_ids"], rendered["labels"]
            problems = self._compared(row, format, ids) if self.thorough and format != "tokens" else []
        except TokenizerProblem as error:
            return Measured(0, 0, 0, (Problem("no-template", error.message),))
        except ChatTemplateOpaque as error:
            return Measured(0, 0, 0, (Problem("template-opaque", error.message),))
        except PronghornError as error:
            return Measured(0, 0, 0, (Problem("template-refuses", error.message),))
        except Exception as error:  # a template's expressions and a tokenizer raise whatever they like
            said = visible(f"{type(error).__name__}: {error}", 160)
            return Measured(0, 0, 0, (Problem("template-refuses", said),))
        count = supervised(labels)
        kept = count if self.max_length is None else supervised(labels[: self.max_length])
        return Measured(len(ids), count, kept, (*problems, *self._lengths(len(ids), count, kept)))

    def _lengths(self, tokens: int, count: int, kept: int) -> list[Problem]:
        if not count:
            return [Problem("nothing-supervised", f"none of the row's {tokens} tokens is trained on")]
        if self.max_length is None or tokens <= self.max_length:
            return []
        lost = f"{tokens:,} tokens: {tokens - self.max_length:,} are cut off, {count - kept:,} of {count:,} that count"
        if not kept:
            return [Problem("nothing-supervised", f"{lost}; none is left to train on")]
        return [Problem("too-long", lost)]

    def _compared(self, row: Mapping[str, Any], format: Format | None, ids: list[int]) -> list[Problem]:
        messages = messages_of(row)
        if messages is None:
            text = "\n".join(text for _, text in texts_of(trained_content(row, format, self.text_field)))
            return self._round_trip(text, self._decoded(self._ids(text)))
        text = self._render.whole.chat_for(row).text(messages)
        problems = self._round_trip(text, self._decoded(ids))
        position = 0
        for index, message in enumerate(messages):
            content = message.get("content")
            if not isinstance(content, str) or message.get("role") not in _SHOWN:
                continue
            field = f"messages[{index}]"
            found = text.find(content.strip(), position)
            if found < 0:
                what = (
                    f"the {visible(str(message.get('role')), 20)}'s text is not in what the template renders"
                )
                problems.append(Problem("template-drops", what, field))
            else:
                position = found + len(content.strip())
            special = self._special.search(content) if self._special is not None else None
            if special is not None:
                problems.append(Problem("special-token", f"the text holds {visible(special[0], 40)}", field))
        return problems

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _round_trip(self, text: str, decoded: str) -> list[Problem]:
        """What of the text its tokens do not give back; spaces and ways to write a letter aside."""
        wanted, got = _letters(text), _letters(decoded)
        if wanted in got:
            return []
        start = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), 0)
        what = f"'{visible(wanted[start : start + 20])}' becomes '{visible(got[start : start + 20])}'"
        return [Problem("token-round-trip", what)]


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _as_trained(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The two conversations that a preference pair is trained on."""
    rows = []
    for name in ("chosen", "rejected"):
        if row.get("prompt") is not None:
            rows.append({"prompt": row["prompt"], "completion": row[name]})
        elif isinstance(row[name], list):
            rows.append({"messages": row[name]})
        else:
            rows.append({"prompt": "", "completion": row[name]})
    return rows


def measure(
    rows: Iterable[tuple[Tag, Mapping[str, Any], Format | None]], meter: Meter, workers: int | None = None
) -> Iterator[tuple[Tag, Measured]]:
    """Every row measured, in order, in several processes where there are many; rows are taken as they are needed."""
    rows = iter(rows)
    for tag, row, format in islice(rows, ROWS_ALONE):
        yield tag, meter(row, format)
    workers = workers or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, 8)
    first = next(rows, None)
    if first is None:
        return
    if workers == 1:
        yield first[0], meter(first[1], first[2])
        for tag, row, format in rows:
            yield tag, meter(row, format)
        return
    yield from _in_processes(first, rows, meter, workers)


def _in_processes(
    first: tuple[Tag, Mapping[str, Any], Format | None],
    rows: Iterator[tuple[Tag, Mapping[str, Any], Format | None]],
    meter: Meter,
    workers: int,
) -> Iterator[tuple[Tag, Measured]]:
    # Forked children share the tokenizer; where there is no fork it is sent to them.
    method = "fork" if hasattr(os, "fork") else "spawn"
    waiting: deque[tuple[list[Tag], Future[list[Measured]]]] = deque()
    chunk = [first, *islice(rows, CHUNK - 1)]
    with ProcessPoolExecutor(workers, get_context(method), _begin, (meter,)) as pool:
        try:
            while chunk or waiting:
                if chunk:
                    tags = [tag for tag, _, _ in chunk]
                    waiting.append(
                        (tags, pool.submit(_measure_chunk, [(row, form) for _, row, form in chunk]))
                    )
                    chunk = list(islice(rows, CHUNK))
                if not chunk or len(waiting) > 3 * workers:
                    tags, done = waiting.popleft()
                    yield from zip(tags, done.result(), strict=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_meter: Meter | None = None


def _begin(meter: Meter) -> None:
    """In each process: the parent answers an interrupt for all."""
    global _meter
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _meter = meter


def _measure_chunk(rows: list[tuple[Mapping[str, Any], Format | None]]) -> list[Measured]:
    assert _meter is not None
    return [_meter(row, format) for row, format in rows]
