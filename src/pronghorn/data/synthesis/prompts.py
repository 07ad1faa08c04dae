"""What the model is asked, in one place. `{text}`, `{count}` and `{question}` are put in.

Questions first and each answer by itself: a small model keeps to a text better than to a form with both in it. The
list of questions is begun for it: a model of 135 million parameters writes something else half the time otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompts:
    """The two prompts for one chunk."""

    questions: str
    answer: str


#: The model's list of questions begins so.
QUESTIONS_BEGIN = "1."

ENGLISH = Prompts(
    questions="""\
Text:
{text}

Write {count} short questions about facts in this text, one per line.""",
    answer="""\
Text:
{text}

Answer this question using only the text above, in one or two sentences. \
If the text does not answer it, write only: NOT IN THE TEXT
Question: {question}""",
)

CHINESE = Prompts(
    questions="""\
文字：
{text}

请就文中的事实提出{count}个简短的问题，每行一个。""",
    answer="""\
文字：
{text}

请只根据上面的文字，用一两句话回答问题。如果文中没有答案，只写：文中没有
问题：{question}""",
)

#: How a model says that it has no answer, in lower case: as it was asked to, or as models refuse.
REFUSALS = (
    "not in the text", "does not mention", "doesn't mention", "does not say", "does not provide", "does not specify",
    "doesn't specify", "not mentioned", "not specified", "i cannot", "i can't", "i'm sorry", "i am sorry", "as an ai",
    "i don't have", "i do not have", "no information", "unable to", "文中没有", "文中未", "无法回答", "抱歉",
)  # fmt: skip

#: Phrases of the prompts that only a copy of them has.
COPIES = (
    "using only the text", "questions about facts", "one per line", "write only", "answer this question",
    "in one or two sentences", "does not answer it", "只根据上面的文字", "每行一个", "用一两句话", "文中的事实",
)  # fmt: skip


def prompts_for(text: str) -> Prompts:
    """Chinese prompts for a text that is mostly Chinese, English ones for all others."""
    letters = [letter for letter in text if letter.isalpha()]
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in letters)
    return CHINESE if letters and chinese > 0.3 * len(letters) else ENGLISH
