"""Characters that a person does not see or mean: invisible, turning the reading order, lost, or read in a wrong
encoding."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

from pronghorn.data.reading import Problem
from pronghorn.pages import visible

_CLASSES = {
    "control": "\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f",
    "invisible": "\u00ad\u180e\u200b\u2060-\u2064\ufeff\ufff9-\ufffb",
    "bidi": "\u200e\u200f\u202a-\u202e\u2066-\u2069",
    "hidden-text": "\U000e0000-\U000e007f",
    "replacement": "\ufffd",
    "private-use": "\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd",
}
_JOINERS = "\u200c\u200d"
#: With the letters that UTF-8 read as Windows-1252 begins with, those left out that Western languages are full of.
_SUSPECT = re.compile(f"[{''.join(_CLASSES.values())}{_JOINERS}ÃÂâÐÑÎÏ×ØÙãåæð]")
_KINDS = {kind: re.compile(f"[{chars}]") for kind, chars in _CLASSES.items()}
#: A joiner shapes letters of Persian and Indic scripts and emoji; between Latin letters it has no work to do.
_IDLE_JOINER = re.compile(f"(?<=[A-Za-z])[{_JOINERS}](?=[A-Za-z])")
#: The flags of England, Scotland and Wales are written with tag characters.
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")
_OVERRIDES = re.compile("[\u202d\u202e]")
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")


def _continuation() -> str:
    """What the bytes 80 to BF, the second and later ones of a UTF-8 character, look like in Windows-1252."""
    chars = []
    for byte in range(0x80, 0xC0):
        try:
            chars.append(bytes([byte]).decode("cp1252"))
        except UnicodeDecodeError:
            chars.append(chr(byte))
    return "".join(chars)


_NEXT = f"[{re.escape(_continuation())}]"
#: Latin letters with accents (Ã©), signs (Â°), quotes and dashes (â€™), and runs of other scripts. One accented
#: capital before a quote («CAFÉ») looks like two such bytes, too, and is none.
_MOJIBAKE = re.compile(
    f"[ÃÂ]{_NEXT}|â[€‚„†ˆ‰]{_NEXT}|(?:[ÐÑÎÏ×ØÙ]{_NEXT}){{3,}}|(?:[ãäåæçèé]{_NEXT}{{2}}){{2,}}|ðŸ{_NEXT}{{2}}"
)


class CharacterCheck:
    """Finds them. Characters that were seen and are none are remembered, so that a text is looked at closely only when
    it has another one: the set of a text's characters is made ten times as fast as a pattern is searched."""

    def __init__(self) -> None:
        self._fine: set[str] = set()

    def problems(self, texts: Iterable[tuple[str, str]]) -> list[Problem]:
        """One problem for each (field, text) and kind of character in it."""
        problems: list[Problem] = []
        for field, text in texts:
            new = set(text) - self._fine
            if new:
                suspect = set(filter(_SUSPECT.match, new))
                self._fine |= new - suspect
                if suspect:
                    problems += _of_text(field, text)
        return problems


def _of_text(field: str, text: str) -> Iterator[Problem]:
    for kind, pattern in _KINDS.items():
        found = _found(kind, pattern, text)
        if found:
            names = ", ".join(dict.fromkeys(f"U+{ord(char):04X}{_name(char)}" for _, char in found[:50]))
            at = found[0][0]
            times = f" ({len(found)} of them)" if len(found) > 1 else ""
            around = visible(text[max(at - 12, 0) : at + 13])
            yield Problem(kind, f"{visible(names, 120)}{times}: {around}", field)
    wrong = [(match, right) for match in _MOJIBAKE.finditer(text) if (right := _read_right(match[0]))]
    if wrong:
        match, right = wrong[0]
        times = f" ({len(wrong)} of them)" if len(wrong) > 1 else ""
        yield Problem("mojibake", f"'{visible(match[0])}' was '{visible(right)}'{times}", field)


def _found(kind: str, pattern: re.Pattern[str], text: str) -> list[tuple[int, str]]:
    if kind == "hidden-text":
        text = _FLAG.sub(lambda flag: " " * len(flag[0]), text)
    if kind == "bidi" and _RIGHT_TO_LEFT.search(text):
        pattern = _OVERRIDES  # marks and isolates belong into such a text
    found = [(match.start(), match[0]) for match in pattern.finditer(text)]
    if kind == "invisible":
        found += [(match.start(), match[0]) for match in _IDLE_JOINER.finditer(text)]
    if kind == "control":  # what a wrong encoding made of letters is told as mojibake
        inside = {
            i for match in _MOJIBAKE.finditer(text) if _read_right(match[0]) for i in range(*match.span())
        }
        found = [item for item in found if item[0] not in inside]
    return found


def _read_right(wrong: str) -> str | None:
    """The text whose UTF-8 bytes read as `wrong` in Windows-1252."""
    data = bytearray()
    for char in wrong:
        try:
            data += char.encode("cp1252")
        except UnicodeEncodeError:
            if ord(char) > 0xFF:
                return None
            data.append(ord(char))
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _name(char: str) -> str:
    name = unicodedata.name(char, "")
    return f" {name.lower()}" if name else ""
