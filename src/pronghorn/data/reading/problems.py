"""Every kind of problem that data can have: a stable id, how bad it is, what it is, how to put it right.

A problem is no exception: a check collects them. `error`: training would fail, or learn something else than is meant;
`warning`: worth a look, and nothing is removed for it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Args:
        title: a few words for a table.
        fix: what the user does about it.
        repaired: `pronghorn data clean` puts it right without guessing.
    """

    id: str
    level: Level
    title: str
    fix: str
    repaired: bool = False


def _kind(id: str, level: Level, title: str, fix: str, repaired: bool = False) -> Kind:
    return Kind(id, level, title, fix, repaired)


_CLEAN = "pronghorn data clean repairs it"
_BY_HAND = "correct the row; pronghorn data clean sets it aside"

KINDS: dict[str, Kind] = {
    kind.id: kind
    for kind in (
        # The file as a whole.
        _kind("unreadable", "error", "cannot be read", "check the file and its permissions"),
        _kind("empty-file", "error", "no rows", "name a file with rows"),
        _kind("bom", "error", "byte order mark", _CLEAN, True),
        _kind("crlf", "warning", "Windows line ends", _CLEAN, True),
        _kind("utf-16", "error", "UTF-16 or UTF-32 file", _CLEAN + ", or iconv -t UTF-8", True),
        _kind(
            "not-utf-8", "error", "bytes that are no UTF-8", "name the encoding, such as --encoding cp1252"
        ),
        _kind("parquet-text", "error", "a text of a Parquet file that is no UTF-8", _BY_HAND),
        _kind("long-line", "error", "line beyond the size limit", "split the row, or leave it out"),
        _kind("array-in-jsonl", "error", "one JSON array in a .jsonl file", _CLEAN, True),
        _kind("nested-rows", "error", "rows inside an object", "write the list of rows itself into the file"),
        # JSON.
        _kind("single-quotes", "error", "single quotes for double ones", _CLEAN, True),
        _kind("trailing-comma", "error", "a comma too many", _CLEAN, True),
        _kind("comment", "error", "a comment", _CLEAN, True),
        _kind("control-character", "error", "raw control character in a text", _CLEAN, True),
        _kind("bad-escape", "error", "a backslash that escapes nothing", _CLEAN, True),
        _kind("python-literal", "error", "None, True or False", _CLEAN, True),
        _kind("unquoted-key", "error", "a key without quotes", _CLEAN, True),
        _kind("nan", "error", "NaN is no JSON", _CLEAN + " (null)", True),
        _kind("infinity", "error", "Infinity is no JSON", "give a number or null"),
        _kind("duplicate-key", "error", "a key twice with the same value", _CLEAN, True),
        _kind("conflicting-key", "error", "a key twice with different values", _BY_HAND),
        _kind("concatenated", "error", "several rows on one line", _CLEAN, True),
        _kind("split-row", "error", "one row over several lines", _CLEAN, True),
        _kind("truncated", "error", "ends in the middle of a row", "write the file again; " + _BY_HAND),
        _kind("lone-surrogate", "error", "half a character (surrogate)", _BY_HAND),
        _kind("too-deep", "error", "nested too deeply", _BY_HAND),
        _kind("broken-json", "error", "no JSON", _BY_HAND),
        _kind("not-a-row", "error", "no object with columns", 'write each row as an object: {"messages": ...}'),
        _kind("json-in-text", "error", "a list written as text", _CLEAN, True),
        # CSV.
        _kind("csv-quote", "error", "a quote that never closes", _BY_HAND),
        _kind("csv-fields", "error", "more or fewer fields than columns", _BY_HAND),
        _kind("csv-header", "error", "column names", "give every column one name of its own"),
        # Rows.
        _kind(
            "unknown-format",
            "error",
            "columns of no known format",
            "give 'messages', 'prompt' and 'completion', 'instruction' and 'output', 'chosen' and 'rejected', "
            "or 'text' (another column: --text-field)",
        ),
        _kind("missing-field", "error", "a field is missing", _BY_HAND),
        _kind("empty-field", "error", "an empty field", _BY_HAND),
        _kind("empty-prompt", "warning", "an empty prompt", "give the question, or leave the row out"),
        _kind("wrong-type", "error", "a field of another type", _BY_HAND),
        _kind("unknown-role", "warning", "a role that templates do not know", "use user, assistant, system or tool"),
        _kind("role-order", "warning", "roles out of order", "let user and assistant take turns, system first"),
        _kind("no-answer", "error", "nothing to train on", "end the conversation with the assistant's answer"),
        _kind("same-answers", "error", "chosen and rejected are the same", _BY_HAND),
        _kind("mixed-format", "warning", "another format than the other rows", "give a file one format"),
        _kind("mixed-types", "warning", "a column of several types", "give the column one type, or remove it"),
        # Sets of rows.
        _kind("duplicate", "warning", "the same row again", "pronghorn data clean --dedup keeps the first"),
        _kind("near-duplicate", "warning", "nearly the same row again", "keep one of them"),
        _kind("leakage", "error", "the same row in two files", "remove it from one of the files"),
        _kind("near-leakage", "warning", "nearly the same row in two files", "remove it from one of the files"),
        _kind("prompt-leakage", "warning", "the same question in two files", "remove it from one of the files"),
        # Tokens.
        _kind("too-long", "warning", "longer than --max-seq-length", "raise --max-seq-length, or split the row"),
        _kind("nothing-supervised", "error", "no token to train on", "see pronghorn data preview"),
        _kind("no-template", "error", "the tokenizer has no chat template", "use the tokenizer of a chat model"),
        _kind("template-refuses", "error", "refused by the chat template", "bring roles and content into its form"),
        _kind("template-opaque", "error", "answers cannot be found in the template", "train on all tokens"),
        _kind("template-drops", "warning", "text that the template leaves out", "see pronghorn data preview"),
        _kind("special-token", "warning", "a special token inside a text", "remove it: it ends or begins a turn"),
        _kind("token-round-trip", "warning", "tokens do not give the text back", "use a tokenizer that knows it"),
        # Characters.
        _kind("invisible", "warning", "invisible characters", "remove them"),
        _kind("bidi", "warning", "characters that turn the reading order", "remove them"),
        _kind("hidden-text", "warning", "hidden text (tag characters)", "remove it"),
        _kind("replacement", "warning", "replacement character, a letter was lost", "take the text from its source"),
        _kind("private-use", "warning", "private-use characters", "replace them"),
        _kind("control", "warning", "control characters", "remove them"),
        _kind("mojibake", "warning", "UTF-8 read as another encoding", "take the text from its source"),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a piece of data, before it is known which file and line it is in.

    Args:
        kind: key of `KINDS`.
        what: one sentence without a full stop.
        field: such as ``messages[2].content``.
    """

    kind: str
    what: str
    field: str = ""
    level: Level | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem and its place.

    Args:
        line: from 1; 0 where the file has no lines (Parquet) or all of it is meant.
        row: from 1, in files whose rows are not lines; 0 otherwise.
    """

    kind: str
    level: Level
    file: str
    line: int
    row: int
    field: str
    what: str
    fix: str
    sample: str = dataclasses.field(default="", compare=False)

    @property
    def place(self) -> str:
        """``rows.jsonl:12`` or ``rows.parquet, row 7``."""
        if self.line:
            return f"{self.file}:{self.line}"
        return f"{self.file}, row {self.row}" if self.row else self.file

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if value not in ("", 0)}


def level_of(problem: Problem) -> Level:
    return problem.level or KINDS[problem.kind].level
