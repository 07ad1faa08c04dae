"""The same questions to a base model and to each of its adapters: their answers side by side, and scores."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from pronghorn.data.collator import BOOKKEEPING, Collator
from pronghorn.data.rows import IGNORED, RowFormat, RowRenderer, as_message, messages_of
from pronghorn.errors import RowInvalid
from pronghorn.inference.generate import Messages
from pronghorn.inference.requests import Request, SamplingParams
from pronghorn.inference.variants import Variant

#: Scripts that are written without spaces count a letter as a word.
_WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)


@dataclass(frozen=True)
class Scores:
    """How a variant does on held-out rows.

    Args:
        rows: that have a question and an answer.
        tokens: of their answers; they may differ between variants of different chat templates.
        loss: nats a token of the rows' answers.
        exact_match: share of answers that are the row's, but for spaces.
        token_f1: mean over the answers of 2·p·r/(p + r), p and r being the shares of the answer's and of the row's
            words that the other has, too.
    """

    rows: int
    tokens: int
    loss: float
    perplexity: float
    exact_match: float
    token_f1: float


@dataclass(frozen=True)
class Asked:
    """One question, the row's own answer where it has one, and what each variant answered."""

    question: str
    reference: str | None
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Compared:
    """`scores` by the variants' names; empty without held-out rows."""

    asked: tuple[Asked, ...]
    scores: Mapping[str, Scores]

    def as_dict(self) -> dict[str, Any]:
        scores = {name: asdict(score) for name, score in self.scores.items()}
        return {"questions": [asdict(asked) for asked in self.asked], "scores": scores}


@dataclass(frozen=True)
class _Rendered:
    """A row as a variant reads it: the prompt before its last answer, that answer, and labels for the loss."""

    ids: list[int]
    labels: list[int]
    start: int
    reference: str


def compare_prompts(
    model: Any, variants: Sequence[Variant], conversations: Sequence[Messages], *, max_new_tokens: int = 128
) -> Compared:
    """Greedy answers to conversations that end with a question, all of them in one batch.

    Raises:
        EngineRefused: the inference engine cannot run this model.
    """
    prompts = [[_prompt(variant, messages) for messages in conversations] for variant in variants]
    answers = _answers(model, variants, prompts, max_new_tokens)
    asked = [
        Asked(messages[-1]["content"], None, {v.name: answers[k][i] for k, v in enumerate(variants)})
        for i, messages in enumerate(conversations)
    ]
    return Compared(tuple(asked), {})


def compare_rows(
    model: Any,
    variants: Sequence[Variant],
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 128,
) -> Compared:
    """Greedy answers to the rows' last questions, and scores against the rows' own answers.

    Args:
        rows: of any kind that training reads and that has a question and an answer.

    Raises:
        RowInvalid: a row has no question before its answer, or cannot be rendered; `where` has its number.
        EngineRefused: the inference engine cannot run this model.
    """
    rendered = [[_rendered(variant, row, i) for i, row in enumerate(rows)] for variant in variants]
    # Before the engine takes most of the memory for its cache.
    losses = []
    for variant, of_variant in zip(variants, rendered, strict=True):
        with _used(model, variant.adapter):
            losses.append(answer_loss(model, of_variant))
    prompts = [[row.ids[: row.start] for row in of_variant] for of_variant in rendered]
    answers = _answers(model, variants, prompts, max_new_tokens)
    references = [row.reference for row in rendered[0]]
    asked = [
        Asked(_question(row), references[i], {v.name: answers[k][i] for k, v in enumerate(variants)})
        for i, row in enumerate(rows)
    ]
    scores = {}
    for k, variant in enumerate(variants):
        loss, tokens = losses[k]
        scores[variant.name] = Scores(
            rows=len(rows),
            tokens=tokens,
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            exact_match=_mean(
                [_spaced(a) == _spaced(b) for a, b in zip(answers[k], references, strict=True)]
            ),
            token_f1=_mean([token_f1(a, b) for a, b in zip(answers[k], references, strict=True)]),
        )
    return Compared(tuple(asked), scores)


def answer_loss(model: Any, rows: Sequence[Any]) -> tuple[float, int]:
    """(nats a supervised token, their number) of rows with `ids` and `labels`, by the model as it is now."""
    import torch

    collate = Collator(pad_token_id=0)
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            batch = collate([{"input_ids": row.ids, "labels": row.labels}])
            given = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
                if name not in BOOKKEEPING
            }
            loss = model(**given, use_cache=False, return_logits=False).loss
            total += float(loss) * batch["supervised"]
            tokens += batch["supervised"]
    return total / max(tokens, 1), tokens


def token_f1(answer: str, reference: str) -> float:
    """2·p·r/(p + r) of the words two texts share; 1 where neither has any."""
    one, other = Counter(_WORDS.findall(answer.casefold())), Counter(_WORDS.findall(reference.casefold()))
    if not one or not other:
        return float(one == other)
    return 2 * (one & other).total() / (one.total() + other.total())


def _answers(
    model: Any, variants: Sequence[Variant], prompts: Sequence[Sequence[Sequence[int]]], new_tokens: int
) -> list[list[str]]:
    """The text of each variant's answer to each of its prompts."""
    from pronghorn.inference.engine import Engine

    engine = Engine(model)
    places: dict[int, list[int]] = {}
    order = []
    for variant, of_variant in zip(variants, prompts, strict=True):
        for prompt in of_variant:
            room = max(1, min(new_tokens, engine.max_context - len(prompt)))
            sampling = SamplingParams(max_new_tokens=room, stop_token_ids=variant.stop_tokens)
            number = engine.submit(Request(tuple(prompt), sampling, variant.adapter))
            order.append(number)
            places[number] = []
    while engine.has_work:
        for event in engine.step():
            places[event.request_id] += [token.id for token in event.tokens]
    numbers = iter(order)
    return [
        [
            variant.tokenizer.decode(places[next(numbers)], skip_special_tokens=True).strip()
            for _ in of_variant
        ]
        for variant, of_variant in zip(variants, prompts, strict=True)
    ]


def _prompt(variant: Variant, messages: Messages) -> list[int]:
    """A conversation's tokens; without a chat template, its last text's."""
    if getattr(variant.tokenizer, "chat_template", None):
        return list(variant.chat_tokens(messages))
    return list(variant.tokenizer(messages[-1]["content"])["input_ids"])


def _rendered(variant: Variant, row: Mapping[str, Any], number: int) -> _Rendered:
    try:
        found = RowRenderer(variant.tokenizer, RowFormat(responses_only=True))(row)
        ids, labels = found["input_ids"], found["labels"]
        end = next((i for i in range(len(ids), 0, -1) if labels[i - 1] != IGNORED), 0)
        start = next((i for i in range(end, 0, -1) if labels[i - 1] == IGNORED), 0)
        if start == 0:
            raise RowInvalid(
                "the row has no question before its answer",
                fix="use rows of messages, prompt and completion, or instruction and output",
            )
    except RowInvalid as error:
        error.where = error.where or f"row {number + 1}"
        raise
    reference = variant.tokenizer.decode(ids[start:end], skip_special_tokens=True).strip()
    return _Rendered(ids, labels, start, reference)


def _question(row: Mapping[str, Any]) -> str:
    """What a row asks, for people to read."""
    messages = messages_of(row) or (
        [as_message(m) for m in row["prompt"]] if isinstance(row.get("prompt"), list) else None
    )
    if messages:
        asked = [message["content"] for message in messages if message["role"] == "user"]
        return str(asked[-1]) if asked else ""
    if row.get("instruction") is not None:
        return "\n\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name))
    return str(row.get("prompt") or "")


@contextmanager
def _used(model: Any, adapter: str | None) -> Iterator[None]:
    """The model with one of its adapters, or none, for a while."""
    if not hasattr(model, "peft_config"):
        yield
    elif adapter is None:
        with model.disable_adapter():
            yield
    else:
        before = model.active_adapter
        model.set_adapter(adapter)
        try:
            yield
        finally:
            model.set_adapter(before)


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
