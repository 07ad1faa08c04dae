"""Answers to a few held-out prompts before and after training: what the curves cannot show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pronghorn.data.collator import documents_of
from pronghorn.data.rows import IGNORED
from pronghorn.engine import evaluating

#: Tokens of an answer, and of the end of a prompt that the model is given.
ANSWER_TOKENS = 48
PROMPT_TOKENS = 512
#: Seconds that all answers of one time may take; they end there.
MOST_SECONDS = 10.0
#: A shorter run is a trial, of which nobody reads answers.
LEAST_STEPS = 20


@dataclass(frozen=True)
class Prompt:
    """Tokens up to where the first supervised one stands, and the supervised ones that follow in the data."""

    ids: tuple[int, ...]
    expected: tuple[int, ...]


def prompts_of(rows: Any, count: int) -> list[Prompt]:
    """The first prompts of prepared rows. A document that is supervised from its beginning is cut in the middle."""
    found: list[Prompt] = []
    for row in rows:
        for document in documents_of(row):
            supervised = (document.labels != IGNORED).nonzero()[0]
            if not len(supervised):
                continue
            start = int(supervised[0])
            start = len(document.ids) // 2 if start <= 1 else start
            end = next(
                (i for i in range(start, len(document.ids)) if document.labels[i] == IGNORED),
                len(document.ids),
            )
            if 0 < start < end:
                ids, expected = document.ids[max(start - PROMPT_TOKENS, 0) : start], document.ids[start:end]
                found.append(Prompt(tuple(map(int, ids)), tuple(map(int, expected[: 2 * ANSWER_TOKENS]))))
            if len(found) == count:
                return found
    return found


def answers(model: Any, tokenizer: Any, prompts: list[Prompt]) -> list[str]:
    """The model's most likely answers. Its mode and the random state are afterwards as they were."""
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    devices = [device] if device.type == "cuda" else []
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=ANSWER_TOKENS,
                max_time=MOST_SECONDS,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                use_cache=True,
            )
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return [tokenizer.decode(row, skip_special_tokens=True) for row in output[:, width:].tolist()]


def held_out_rows(trainer: Any) -> Any:
    """The evaluation data, the first of several."""
    rows = trainer.eval_dataset
    return next(iter(rows.values()), None) if isinstance(rows, dict) else rows


def why_none(trainer: Any) -> str | None:
    """Why a run leaves no samples, or None."""
    args, rows = trainer.args, held_out_rows(trainer)
    if args.report_samples < 1:
        return "report_samples=0"
    if "labels" not in (getattr(rows, "column_names", None) or ()):
        return "there are no held-out rows to take prompts from"
    if args.push_to_hub:
        return "the folder goes to the hub, and the data with them would"
    if trainer.state.max_steps < LEAST_STEPS:
        return f"the run has fewer than {LEAST_STEPS} steps"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "the model is spread over several devices"
    return None
