"""Advice for a loaded model and its rows, as arguments of `SFTConfig`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Any

from pronghorn.data.checks.formats import format_of, texts_of
from pronghorn.data.checks.measure import Meter
from pronghorn.data.rows import messages_of
from pronghorn.errors import DatasetUnusable
from pronghorn.tuning.advice import Facts, advise

logger = logging.getLogger("pronghorn")

#: Rows that are looked at.
SAMPLE = 1000
#: Characters of a token, where nobody gave a tokenizer: English text in the vocabularies of today.
CHARACTERS = 4.0
#: Tokens of a micro-batch that keep a GPU busy, and that a CPU's caches like.
MICRO_BATCH = {"cuda": 16_384, "cpu": 2_048}


def recommended_arguments(
    model: Any, rows: Any, tokenizer: Any = None, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Arguments by name: rate, batch, accumulation, epochs, warm-up, schedule. `given` ones are taken as they are.

    Raises:
        DatasetUnusable: there are no rows, or none with text or tokens.
    """
    given = given or {}
    facts = facts_of(model, rows, tokenizer, given)
    advice = {one.name: one for one in advise(facts)}
    for one in advice.values():
        logger.info("pronghorn: %s=%s: %s (%s)", one.name, one.value, one.rule, one.source)
    batch = int(advice["batch"].value)
    device = next(model.parameters()).device.type
    micro = given.get("per_device_train_batch_size") or batch
    while micro > 1 and "per_device_train_batch_size" not in given:
        if micro * facts.tokens <= MICRO_BATCH.get(device, MICRO_BATCH["cpu"]):
            break
        micro //= 2
    values = {name: advice[name].value for name in ("learning_rate", "num_train_epochs", "lr_scheduler_type")}
    values |= {
        "warmup_steps": advice["warmup_steps"].value,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(batch // micro, 1),
    }
    return {name: value for name, value in values.items() if name not in given}


def facts_of(model: Any, rows: Any, tokenizer: Any, given: Mapping[str, Any]) -> Facts:
    """What the rules need, read from a model with or without adapters and a sample of the rows."""
    config = model.config
    adapter = next(iter(getattr(model, "peft_config", {}).values()), None)
    count, tokens, supervised = _lengths(rows, tokenizer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rank = getattr(adapter, "r", None)
    batch = None
    if "per_device_train_batch_size" in given:
        batch = given["per_device_train_batch_size"] * given.get("gradient_accumulation_steps", 1)
    steps = given.get("max_steps", -1)
    return Facts(
        model_type=config.model_type,
        hidden=config.get_text_config().hidden_size,
        rank_parameters=max(trained // rank, 1) if rank else 1,
        rows=count,
        tokens=tokens,
        supervised=supervised,
        adapters=adapter is not None,
        rank=rank,
        alpha=getattr(adapter, "lora_alpha", None),
        rslora=bool(getattr(adapter, "use_rslora", False)),
        batch=batch,
        epochs=given.get("num_train_epochs"),
        steps=steps if steps > 0 else None,
    )


def _lengths(rows: Any, tokenizer: Any) -> tuple[int, float, float]:
    """(rows, tokens and supervised tokens of an average one), from a sample at the data's beginning."""
    measured = [
        length for row in itertools.islice(iter(rows), SAMPLE) if (length := _length(row, tokenizer))[0] > 0
    ]
    if not measured:
        raise DatasetUnusable("no row has text or tokens to count", fix="see pronghorn data check")
    count = len(rows) if hasattr(rows, "__len__") else len(measured)
    totals = [sum(part) / len(measured) for part in zip(*measured, strict=True)]
    return count, totals[0], totals[1]


def _length(row: Mapping[str, Any], tokenizer: Any) -> tuple[float, float]:
    if "input_ids" in row:
        labels = row.get("labels")
        tokens = len(row["input_ids"])
        return tokens, tokens if labels is None else sum(label != -100 for label in labels)
    if tokenizer is not None:
        found = Meter(tokenizer)(row, format_of(row))
        return found.tokens, found.supervised
    messages = messages_of(row)
    if messages is None:
        length = sum(len(text) for _, text in texts_of(row)) / CHARACTERS
        return length, length
    sizes = [(message.get("role"), len(str(message.get("content") or ""))) for message in messages]
    answers = sum(size for role, size in sizes if role == "assistant")
    return sum(size for _, size in sizes) / CHARACTERS, answers / CHARACTERS
