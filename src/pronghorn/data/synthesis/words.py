"""The words of a text that carry its meaning, so that two texts can be compared by them."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"[\u4e00-\u9fff]+|[^\W_]+(?:['’][a-z]+)?")
_CODE = re.compile(r"_|(?<=[a-z])(?=[A-Z])")
_ENDINGS = (
    "ations",
    "ation",
    "ings",
    "ing",
    "edly",
    "ed",
    "est",
    "ers",
    "er",
    "ies",
    "es",
    "ly",
    "s",
    "e",
    "y",
)
#: Words of every text; in one line of text each, since a list of them would take a page.
_EMPTY = frozenset(
    """
    a about above according after again all also an and answer any are as at be because been before being below
    between both but by called can could describe did do does doing done down each either else every explain few
    following for from further get gets give given had has have having he her here him his how i if in into is
    it its itself just let like made make makes many may me mean means might more most much must my name neither
    no nor not of off on once one only or other our out over own per please purpose question same she should so
    some such text than that the their them then there these they this those through to too two under until up
    upon us use used uses using very was we well were what when where whether which while who whom whose why
    will with within without would yes you your
    """.split()  # noqa: SIM905
)
_EMPTY_CHINESE = frozenset("的了是在和有与及或也就都而被把对从到这那其为以于之什么怎样如何哪些谁请问")


def content_words(text: str) -> set[str]:
    """Stems of the words with a meaning of their own; numbers; pairs of neighbouring letters of Chinese."""
    words: set[str] = set()
    for token in _TOKEN.findall(_CODE.sub(" ", text)):
        if "\u4e00" <= token[0] <= "\u9fff":
            words |= {
                token[i : i + 2] for i in range(len(token) - 1) if not set(token[i : i + 2]) & _EMPTY_CHINESE
            }
        elif (low := token.lower()) not in _EMPTY and (len(low) > 1 or low.isdigit()):
            words.add(stem(low))
    return words


def stem(word: str) -> str:
    """A word without its ending, roughly: 'generates', 'generated' and 'generation' are one."""
    word = word.split("'")[0].split("’")[0]
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def supported(words: set[str], by: set[str]) -> float:
    """The share of words that also stand in the other set; 0 for none."""
    return len(words & by) / len(words) if words else 0.0
