"""Masks found by comparing renderings, on the chat templates of models in wide use.

TRL ships training versions of many templates, with generation blocks around what the assistant writes. Masks found on
the originals agree with them. Ours leave out what the generation prompt already says (a header, an empty thought) and
whitespace at the end.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trl

from pronghorn.errors import RowInvalid
from tests.data.test_rows import CHAT, render, tokenizer_with

FOLDER = Path(trl.__file__).parent / "chat_templates"
#: Those of vision models take content in parts only.
VISION = {"idefics3", "llava_next", "smolvlm"}
PAIRS = sorted(
    path.stem for path in FOLDER.glob("*.jinja") if (FOLDER / f"{path.stem}_training.jinja").exists()
)
CONVERSATIONS = {"question": CHAT[1:3], "system": CHAT[:3], "turns": CHAT[1:], "open": CHAT[1:4]}
THOUGHT = re.compile(r"(<think>)?\s*</think>\s*")


def without_thought(text: str) -> str:
    return THOUGHT.sub("", text).strip()


def test_there_are_templates_to_compare():
    assert {"llama3", "qwen2_5", "qwen3", "gemma3", "phi3"} <= set(PAIRS)


@pytest.mark.parametrize("template", [name for name in PAIRS if name not in VISION])
def test_masks_of_well_known_templates(template):
    original = tokenizer_with((FOLDER / f"{template}.jinja").read_text())
    marked = tokenizer_with((FOLDER / f"{template}_training.jinja").read_text())
    for name, messages in CONVERSATIONS.items():
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        try:
            _, expected, _ = render({"messages": messages}, marked, responses_only=True)
        except RowInvalid:
            assert (template, name) == ("gemma", "system")  # "System role not supported"
            continue
        _, trained, _ = render({"messages": messages}, original, responses_only=True)
        assert len(trained) == len(expected) == len(answers), name
        for ours, theirs, answer in zip(trained, expected, answers, strict=True):
            assert answer in ours
            ours, theirs = without_thought(ours), without_thought(theirs)
            # GLM's training template adds the stop to the last turn, which the original does not have.
            assert theirs.endswith(ours) or (template == "glm4moe" and theirs.endswith(f"{ours}<|user|>")), (
                name
            )
