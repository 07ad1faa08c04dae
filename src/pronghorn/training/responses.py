"""Train on responses only, on a trainer's prepared data: by the chat template's own spans, or by given markers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from pronghorn.data.answers import AnswerFinder, answer_finder
from pronghorn.data.rows import IGNORED, supervised
from pronghorn.data.vision import VisionDataCollator
from pronghorn.errors import NothingSupervised

#: Ways in which one marker may be tokenised.
Marker = tuple[tuple[int, ...], ...]
#: Which tokens of one document belong to responses.
Finder = Callable[[Sequence[int]], list[bool]]


@dataclass(frozen=True)
class ResponseMask:
    """Labels of a row outside responses become -100. A packed row is looked at document by document."""

    responses: Finder

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        ids = list(row["input_ids"])
        labels = list(row["labels"]) if row.get("labels") is not None else list(ids)
        start = 0
        for length in row.get("seq_lengths") or [len(ids)]:
            inside = self.responses(ids[start : start + length])
            for offset, kept in enumerate(inside):
                if not kept:
                    labels[start + offset] = IGNORED
            start += length
        return {"labels": labels}


@dataclass(frozen=True)
class MarkerFinder:
    """A response runs from after a response marker to the next instruction marker, or to the end of its document."""

    instruction: Marker
    response: Marker

    def __call__(self, ids: Sequence[int]) -> list[bool]:
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
    *,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
) -> Any:
    """Mask everything but the responses in a trainer's data; returns the trainer.

    Rows with images are masked when a batch is made of them.

    Args:
        instruction_part: text that begins an instruction, such as ``"<|im_start|>user\\n"``, with response_part. None
            takes what the assistant writes according to the tokenizer's chat template: from the end of the
            generation prompt to the end of the turn, without tool results and later system messages.
        response_part: text that begins a response, such as ``"<|im_start|>assistant\\n"``.
        num_proc: processes that mask rows.
        force_match: has no effect: a marker is always found however its ends were tokenised.
        tokenizer: another one than the trainer's.
        return_function: return the function that masks one row instead; the trainer may be None then.

    Raises:
        ValueError: only one of the two parts is given.
        TokenizerProblem: no parts are given, and there is no chat template.
        ChatTemplateOpaque: no parts are given, and the template writes nothing around answers.
        NothingSupervised: no row has anything left to train on.
    """
    if (instruction_part is None) != (response_part is None):
        raise ValueError("give both instruction_part and response_part, or neither")
    tokenizer = trainer.processing_class if tokenizer is None else tokenizer
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if instruction_part is None or response_part is None:
        mask = ResponseMask(answer_finder(tokenizer))
    else:
        mask = ResponseMask(
            MarkerFinder(_marker(tokenizer, instruction_part), _marker(tokenizer, response_part))
        )
    if return_function:
        return mask
    if isinstance(trainer.data_collator, VisionDataCollator):
        trainer.data_collator.find_answers = mask.responses
        return trainer
    trainer.train_dataset = _masked(trainer.train_dataset, mask, num_proc, "train")
    evaluation = trainer.eval_dataset
    if isinstance(evaluation, dict):
        trainer.eval_dataset = {key: _masked(value, mask, num_proc, key) for key, value in evaluation.items()}
    elif evaluation is not None:
        trainer.eval_dataset = _masked(evaluation, mask, num_proc, "eval")
    return trainer


def _marker(tokenizer: Any, text: str) -> Marker:
    """Every way a marker may be tokenised in its surroundings, the longest first.

    Whitespace at its ends may merge with what stands there or be cut otherwise in front of a word, and a word may get
    another token after a newline.
    """

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    core, newline = text.strip(), tokens("\n")
    found = {tokens(text), tokens(text.lstrip()), tokens(core)}
    for inner in (text.lstrip(), core):
        after_newline = tokens("\n" + inner)
        if after_newline[: len(newline)] == newline:
            found.add(after_newline[len(newline) :])
    for word in ("x", "1"):  # where "\n\n" is one token at the end of a text, but two in front of a word
        before_word, alone = tokens(text.lstrip() + word), tokens(word)
        if before_word[-len(alone) :] == alone:
            found.add(before_word[: -len(alone)])
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
        if isinstance(mask.responses, AnswerFinder):
            beginning = "an answer's beginning"
            fix = "render the rows with the tokenizer's chat template, or give instruction_part and response_part"
        else:
            beginning = "the response marker"
            fix = (
                "check instruction_part and response_part against the chat template's text, or leave both out"
            )
        raise NothingSupervised(f"no row of the {name} data has a token after {beginning}", fix=fix)
    return kept


def _trains(row: Mapping[str, Any]) -> bool:
    return supervised(row["labels"]) > 0
