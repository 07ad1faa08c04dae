"""Train on responses only, by the texts that mark instructions and responses, on a trainer's prepared data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from pronghorn.data.rows import IGNORED, supervised
from pronghorn.data.templates import ChatRenderer
from pronghorn.errors import NothingSupervised

#: Ways in which one marker may be tokenised.
Marker = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ResponseMask:
    """Labels of a row outside responses become -100. A response runs from after a response marker to the next
    instruction marker, or to the end of its document."""

    instruction: Marker
    response: Marker

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        ids = list(row["input_ids"])
        labels = list(row["labels"]) if row.get("labels") is not None else list(ids)
        start = 0
        for length in row.get("seq_lengths") or [len(ids)]:
            inside = self._inside(ids[start : start + length])
            for offset, kept in enumerate(inside):
                if not kept:
                    labels[start + offset] = IGNORED
            start += length
        return {"labels": labels}

    def _inside(self, ids: list[int]) -> list[bool]:
        """Whether each token of one document belongs to a response."""
        kept = [False] * len(ids)
        position, inside = 0, False
        while position < len(ids):
            if length := _length_at(ids, position, self.response):
                inside = True
            elif length := _length_at(ids, position, self.instruction):
                inside = False
            else:
                kept[position] = inside
            position += length or 1
        return kept


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    num_proc: int | None = None,
) -> Any:
    """Mask everything but the responses in a trainer's data; returns the trainer.

    Args:
        instruction_part: text that begins an instruction, such as ``"<|im_start|>user\\n"``. None finds both parts in
            the tokenizer's chat template.
        response_part: text that begins a response, such as ``"<|im_start|>assistant\\n"``.

    Raises:
        ValueError: only one of the two parts is given.
        NothingSupervised: the markers leave no row anything to train on.
    """
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if (instruction_part is None) != (response_part is None):
        raise ValueError("give both instruction_part and response_part, or neither")
    if instruction_part is None or response_part is None:
        instruction_part, response_part = parts_of_template(tokenizer)
    mask = ResponseMask(_marker(tokenizer, instruction_part), _marker(tokenizer, response_part))
    trainer.train_dataset = _masked(trainer.train_dataset, mask, num_proc, "train")
    evaluation = trainer.eval_dataset
    if isinstance(evaluation, dict):
        trainer.eval_dataset = {key: _masked(value, mask, num_proc, key) for key, value in evaluation.items()}
    elif evaluation is not None:
        trainer.eval_dataset = _masked(evaluation, mask, num_proc, "eval")
    return trainer


def parts_of_template(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before a user's and before an assistant's content.

    Raises:
        TokenizerProblem: there is no chat template.
        NothingSupervised: the template shows no such texts.
    """
    renderer = ChatRenderer(tokenizer)
    question, answer = {"role": "user", "content": "Ж1"}, {"role": "assistant", "content": "Ж2"}
    closed = renderer.text([question, answer])
    longer = renderer.text([question, answer, {"role": "user", "content": "Ж3"}])
    asked, unasked = renderer.text([question], ask=True), renderer.text([question])
    instruction, response = "", ""
    if "Ж3" in longer and "Ж2" in closed:
        start = len(closed) if longer.startswith(closed) else longer.index("Ж2") + 2
        instruction = longer[start : longer.index("Ж3")]
        response = asked[len(unasked) :] if asked.startswith(unasked) else ""
        # A template without a generation prompt marks the response by what ends the question.
        response = response if response.strip() else closed[closed.index("Ж1") + 2 : closed.index("Ж2")]
    if not instruction.strip() or not response.strip():
        raise NothingSupervised(
            "the chat template does not show what begins an instruction and a response",
            fix="give instruction_part and response_part",
        )
    return instruction, response


def _marker(tokenizer: Any, text: str) -> Marker:
    """Every way a marker may be tokenised in its surroundings, the longest first.

    Whitespace at its ends may merge with what stands there, and a word may get another token after a newline.
    """

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    core, newline = text.strip(), tokens("\n")
    found = {tokens(text), tokens(text.lstrip()), tokens(core)}
    for inner in (text.lstrip(), core):
        after_newline = tokens("\n" + inner)
        if after_newline[: len(newline)] == newline:
            found.add(after_newline[len(newline) :])
    return tuple(sorted((marker for marker in found if marker), key=lambda marker: (-len(marker), marker)))


def _length_at(ids: Sequence[int], position: int, markers: Marker) -> int:
    """Tokens that a marker takes at this position, 0 where none begins."""
    for marker in markers:
        if ids[position] == marker[0] and tuple(ids[position : position + len(marker)]) == marker:
            return len(marker)
    return 0


def _masked(dataset: Any, mask: ResponseMask, num_proc: int | None, name: str) -> Any:
    if not isinstance(dataset, Dataset):
        return dataset.map(mask).filter(_trains)
    masked = dataset.map(mask, num_proc=num_proc, desc=f"Masking {name} data")
    kept = masked.filter(_trains, num_proc=num_proc, desc=f"Checking {name} data")
    if not len(kept):
        raise NothingSupervised(
            f"no row of the {name} data has a token after the response marker",
            fix="check instruction_part and response_part against the chat template's text",
        )
    return kept


def _trains(row: Mapping[str, Any]) -> bool:
    return supervised(row["labels"]) > 0
