"""What a model wrote, parsed strictly and kept only where it is a question or an answer that the text supports.

Each function gives what is kept, and counts what is not under its reason.
"""

from __future__ import annotations

import re
from collections import Counter

from pronghorn.data.synthesis.chunks import Chunk
from pronghorn.data.synthesis.prompts import COPIES, REFUSALS
from pronghorn.data.synthesis.words import content_words, supported

#: Words of a question and of an answer.
QUESTION_WORDS, ANSWER_WORDS = (3, 40), (3, 120)
#: The least share of their words with a meaning that must stand in the chunk.
QUESTION_SUPPORT, ANSWER_SUPPORT = 0.5, 0.75
#: The least share of an answer's words that must stand in two neighbouring sentences of the chunk.
ANSWER_TOGETHER = 0.6
#: From so many words on, an answer names something of its question.
LONG_ANSWER = 10

_NUMBERING = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.):、]|[Qq](?:uestion)?\s*\d{0,2}\s*[:.)])\s*")
_LABEL = re.compile(r"^\s*(?:\*\*)?(?:answer|a|答案|答|回答)(?:\*\*)?\s*[:：]\s*(?:\*\*)?", re.IGNORECASE)
_OTHER_TURN = re.compile(
    r"^\s*(?:question|text|answer|问题|文字|答案)\s*[:：]|<\|", re.IGNORECASE | re.MULTILINE
)
#: Text in backticks; identifiers with an underscore, an inner capital, a dot or brackets; numbers.
_NAME = re.compile(
    r"(`[^`\n]+`)|(\b[A-Za-z]+(?:_\w+)+|\b[a-z]\w*\.[A-Za-z_]\w+|\b[A-Za-z_]\w*\(\)|\b[A-Z]?[a-z]+[A-Z]\w*)|(\b\d[\d.,]*)"
)
_SENTENCES = re.compile(r"(?<=[.!?。！？])\s*(?=\s|[\u4e00-\u9fff])|\n\s*\n")
#: Words that point to what a reader of the row does not see.
_POINTING = re.compile(
    r"\b(?:this|the|above|following|given)\s+(?:text|passage|article|document|paragraph|section|excerpt|chunk)\b"
    r"|(?:上文|下文|本文|文中|这段文字)",
    re.IGNORECASE,
)


def questions_in(written: str, chunk: Chunk, count: int, rejected: Counter[str]) -> list[str]:
    """At most `count` questions that the chunk can be asked: one a line, up to the first blank line after one."""
    known = content_words(chunk.shown)
    found: list[str] = []
    lines = [
        " ".join(_NUMBERING.sub("", line).strip().strip("*\"'").split()) for line in written.splitlines()
    ]
    while lines and not lines[0]:
        lines.pop(0)
    for question in lines:
        if not question or len(found) == count:
            break
        reason = _why_no_question(question, chunk, known)
        if reason is None and question.casefold() in {other.casefold() for other in found}:
            reason = "duplicate"
        if reason is None:
            found.append(question)
        else:
            rejected[reason] += 1
    return found


def _why_no_question(question: str, chunk: Chunk, known: set[str]) -> str | None:
    if not question.endswith(("?", "？")):
        return "not a question"
    if not QUESTION_WORDS[0] <= _length(question) <= QUESTION_WORDS[1]:
        return "question too short or long"
    if question.count("?") + question.count("？") > 1:
        return "several questions"
    if _POINTING.search(question) or _copies(question):
        return "question about the prompt"
    if _unknown_names(question, chunk):
        return "question names what the chunk does not"
    words = content_words(question)
    if not words or supported(words, known) < QUESTION_SUPPORT:
        return "question not about the chunk"
    return None


def answer_in(
    written: str, finished: bool, question: str, chunk: Chunk, rejected: Counter[str]
) -> str | None:
    """The answer, where it is one and the chunk supports it."""
    answer = _LABEL.sub("", written.strip()).strip()
    reason = _why_no_answer(answer, finished, question, chunk)
    if reason is None:
        return answer
    rejected[reason] += 1
    return None


def _why_no_answer(answer: str, finished: bool, question: str, chunk: Chunk) -> str | None:
    low = answer.casefold()
    if any(refusal in low for refusal in REFUSALS):
        return "refused or not in the chunk"
    if not ANSWER_WORDS[0] <= _length(answer) <= ANSWER_WORDS[1]:
        return "answer too short or long"
    if not finished:
        return "answer not finished"
    if _OTHER_TURN.search(answer) or _copies(answer) or _POINTING.search(answer):
        return "answer copies the prompt"
    if answer.endswith(("?", "？")):
        return "answer is a question"
    if _repeats(answer):
        return "answer repeats itself"
    words = content_words(answer)
    asked = content_words(question)
    if words <= asked:
        return "answer says nothing new"
    if _length(answer) >= LONG_ANSWER and not words & asked:
        return "answer not about the question"
    if _unknown_names(answer, chunk):
        return "answer names what the chunk does not"
    if supported(words, content_words(chunk.shown)) < ANSWER_SUPPORT:
        return "answer not supported by the chunk"
    if max(supported(words, together) for together in _neighbours(chunk)) < ANSWER_TOGETHER:
        return "answer put together of far parts"
    return None


def _unknown_names(text: str, chunk: Chunk) -> bool:
    """Whether a text has code, an identifier or a number that the chunk has not, letter by letter."""
    low = chunk.shown.casefold()
    names = (name.strip("`.,()").casefold() for match in _NAME.findall(text) for name in match if name)
    return any(not re.search(rf"(?<!\w){re.escape(name)}(?![0-9_])", low) for name in names if name)


def _neighbours(chunk: Chunk) -> list[set[str]]:
    """The words of every two sentences that follow each other, the first with the headings."""
    words = [content_words(part) for part in _SENTENCES.split(chunk.text) if part.strip()]
    headings = content_words(" ".join(chunk.headings))
    return [headings | one | other for one, other in zip([set(), *words], [*words, set()], strict=True)]


def _length(text: str) -> int:
    """Words; two letters of Chinese count as one."""
    chinese = len(re.findall(r"[\u4e00-\u9fff]", text))
    return len(re.findall(r"[^\W\u4e00-\u9fff]+", text)) + (chinese + 1) // 2


def _copies(text: str) -> bool:
    low = text.casefold()
    return any(phrase in low for phrase in COPIES)


def _repeats(text: str) -> bool:
    """Whether a stretch of five words comes three times, as when a model goes in circles."""
    words = text.casefold().split()
    stretches = Counter(tuple(words[i : i + 5]) for i in range(len(words) - 4))
    return bool(stretches) and stretches.most_common(1)[0][1] >= 3
