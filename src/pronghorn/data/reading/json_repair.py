"""Broken JSON to JSON, where there is exactly one way to read it.

The text is rewritten token by token: what is JSON already (numbers, texts) is copied as it stands, and only what is
broken changes. What has more than one reading (an apostrophe inside single quotes, a missing comma, a key with two
values) or has lost something (a truncated row, half a surrogate pair) is refused with the place.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

#: Deeper rows are refused: every level takes stack.
MAX_DEPTH = 100

_SPACE = re.compile(r"[ \t\n\r]*")
_COMMENT = re.compile(r"//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_DOUBLE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SINGLE = re.compile(r"'[^'\\]*(?:\\.[^'\\]*)*'", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![0-9A-Za-z_.+-])")
_NAME = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")
_CONTROL = re.compile(r"[\x00-\x1f]")
_ESCAPE = re.compile(r'\\(?:(["\\/bfnrt]|u[0-9a-fA-F]{4})|(.))', re.DOTALL)
_PYTHON_ESCAPE = re.compile(
    r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|([0-7]{1,3})|(.))", re.DOTALL
)
_PYTHON_LETTERS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\n": ""} | {
    char: char for char in "\\'\"/"
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_WORDS = {"true": "true", "false": "false", "null": "null"}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True)
class Repaired:
    """JSON texts of the values that stood in the text, one after the other, and the kinds of what was repaired."""

    texts: tuple[str, ...]
    repairs: tuple[str, ...]


class Irreparable(Exception):
    """The text cannot be repaired without guessing; `kind` is one of `problems.KINDS`."""

    def __init__(self, kind: str, what: str, position: int) -> None:
        super().__init__(what)
        self.kind, self.what, self.position = kind, what, position


def repair_json(text: str) -> Repaired:
    """The values in `text` as JSON.

    Raises:
        Irreparable: with the kind, the reason and the place.
    """
    rewriter = _Rewriter(text, python=False)
    texts = rewriter.values()
    if "bad-escape" in rewriter.repairs and rewriter.repairs & {"single-quotes", "python-literal"}:
        # A row that Python printed: its escapes (\xa0, \') are Python's in double quotes, too.
        rewriter = _Rewriter(text, python=True)
        texts = rewriter.values()
    return Repaired(tuple(texts), tuple(sorted(rewriter.repairs)))


class _Rewriter:
    """Reads from `position` on; every method returns JSON text or raises `Irreparable`."""

    def __init__(self, text: str, *, python: bool) -> None:
        self.text, self.python = text, python
        self.position = 0
        self.repairs: set[str] = set()

    def values(self) -> list[str]:
        found = []
        if self.text.startswith("\ufeff"):
            self.repairs.add("bom")
            self.position = 1
        self._skip()
        while self.position < len(self.text):
            found.append(self._value(0))
            self._skip()
            if self._take(","):
                self.repairs.add("trailing-comma")
                self._skip()
        if len(found) > 1:
            self.repairs -= {"trailing-comma"}
            self.repairs.add("concatenated")
            if not all(text.startswith("{") for text in found):
                raise Irreparable("broken-json", "something stands behind the row", self.position)
        return found

    def _skip(self) -> None:
        """Past white space and comments."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
            comment = _COMMENT.match(self.text, self.position)
            if comment is None:
                return
            self.repairs.add("comment")
            self.position = comment.end()

    def _take(self, char: str) -> bool:
        if self.text.startswith(char, self.position):
            self.position += 1
            return True
        return False

    def _broken(self, what: str) -> Irreparable:
        if self.position >= len(self.text):
            return Irreparable("truncated", "the row ends in the middle", self.position)
        return Irreparable("broken-json", what, self.position)

    def _value(self, depth: int) -> str:
        if depth > MAX_DEPTH:
            raise Irreparable("too-deep", f"nested deeper than {MAX_DEPTH} levels", self.position)
        start = self.text[self.position : self.position + 1]
        if start == "{":
            return self._object(depth)
        if start == "[":
            return self._list(depth)
        if start in ('"', "'") and start:
            return self._string()
        number = _NUMBER.match(self.text, self.position)
        if number is not None:
            self.position = number.end()
            return number[0]
        return self._word()

    def _object(self, depth: int) -> str:
        members: dict[str, tuple[str, str]] = {}
        self.position += 1
        self._skip()
        while not self._take("}"):
            at = self.position
            written = self._key()
            self._skip()
            if not self._take(":"):
                raise self._broken("a key without ':' behind it")
            self._skip()
            value = self._value(depth + 1)
            key = json.loads(written)
            if key not in members:
                members[key] = (written, value)
            elif _canonical(members[key][1]) == _canonical(value):
                self.repairs.add("duplicate-key")
            else:
                raise Irreparable(
                    "conflicting-key", f"the key {written} stands twice with different values", at
                )
            self._separator("}")
        return "{" + ", ".join(f"{key}: {value}" for key, value in members.values()) + "}"

    def _key(self) -> str:
        if self.text[self.position : self.position + 1] in ('"', "'"):
            return self._string()
        name = _NAME.match(self.text, self.position)
        if name is None:
            raise self._broken("a key is expected here")
        self.repairs.add("unquoted-key")
        self.position = name.end()
        return json.dumps(name[0])

    def _list(self, depth: int) -> str:
        items = []
        self.position += 1
        self._skip()
        while not self._take("]"):
            items.append(self._value(depth + 1))
            self._separator("]")
        return "[" + ", ".join(items) + "]"

    def _separator(self, end: str) -> None:
        """Past a comma, or up to `end`."""
        self._skip()
        if self._take(","):
            self._skip()
            if self.text.startswith(end, self.position):
                self.repairs.add("trailing-comma")
        elif not self.text.startswith(end, self.position):
            raise self._broken(f"',' or '{end}' is expected here")

    def _word(self) -> str:
        sign = self._take("-")
        name = _NAME.match(self.text, self.position)
        word = name[0] if name else ""
        if word in ("Infinity", "inf"):
            raise Irreparable("infinity", "Infinity is a number that JSON does not have", self.position)
        if sign or not word:
            raise self._broken("a value is expected here")
        if word in ("NaN", "nan"):
            self.repairs.add("nan")
        elif word in _PYTHON_WORDS:
            self.repairs.add("python-literal")
        elif word not in _WORDS:
            whole = self.position + len(word) >= len(self.text)
            if whole and any(known.startswith(word) for known in _WORDS):
                self.position = len(self.text)
            raise self._broken(f"'{word[:20]}' is no value")
        self.position += len(word)
        return _WORDS.get(word) or _PYTHON_WORDS.get(word, "null")

    def _string(self) -> str:
        single = self.text[self.position] == "'"
        found = (_SINGLE if single else _DOUBLE).match(self.text, self.position)
        if found is None:
            self.position = len(self.text)
            raise self._broken("")
        body, at, self.position = found[0][1:-1], self.position, found.end()
        if single:
            self.repairs.add("single-quotes")
            self._refuse_more_quotes()
            written = json.dumps(_unescaped(body), ensure_ascii=False)
        elif self.python and not _is_json(found[0]):
            written = json.dumps(_unescaped(body), ensure_ascii=False)
        else:
            written = '"' + self._json_body(body) + '"'
        if ("\\u" in written or single or self.python) and _SURROGATE.search(json.loads(written)):
            raise Irreparable("lone-surrogate", "a text holds half a character (a lone surrogate)", at)
        return written

    def _refuse_more_quotes(self) -> None:
        """A text in single quotes must be followed by what follows a value; else an apostrophe has ended it."""
        following = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
        if self.text[following : following + 1] not in (",", ":", "}", "]", "/", "#", ""):
            raise Irreparable(
                "broken-json",
                "an apostrophe inside single quotes leaves open where the text ends",
                self.position,
            )

    def _json_body(self, body: str) -> str:
        if "\\" in body:
            fixed = _ESCAPE.sub(self._escape, body)
            body = fixed
        if _CONTROL.search(body):
            self.repairs.add("control-character")
            body = _CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], body)
        return body

    def _escape(self, found: re.Match[str]) -> str:
        if found[1]:
            return found[0]
        self.repairs.add("bad-escape")
        return "'" if found[2] == "'" else "\\\\" + found[2]


def _is_json(string: str) -> bool:
    return not _CONTROL.search(string) and all(found[1] for found in _ESCAPE.finditer(string[1:-1]))


def _unescaped(body: str) -> str:
    """A text between Python's quotes, as Python reads it: an unknown escape keeps its backslash."""

    def character(found: re.Match[str]) -> str:
        code = found[1] or found[2] or found[3]
        if code or found[4]:
            number = int(code, 16) if code else int(found[4], 8)
            return chr(number) if number < 0x110000 else found[0]
        return _PYTHON_LETTERS.get(found[5], found[0])

    decoded = _PYTHON_ESCAPE.sub(character, body)
    # JavaScript and json.dumps write what lies beyond U+FFFF as two escapes.
    return decoded.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _canonical(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)
