"""The gate of exports: an exported model, opened by what will run it, must predict what the live model predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Token ids [T] -> logits [T, V].
Predict = Callable[[Sequence[int]], Tensor]

#: What is compared where no held-out rows are given: prose, code, figures, another script.
PROBE_TEXTS = (
    "The pronghorn is the fastest land animal of North America. It can run at about 88 kilometres an hour, and keeps "
    "up half of that for several miles.",
    "Question: Which of these numbers is prime: 51, 57 or 59? Answer: 59, because 51 = 3 * 17 and 57 = 3 * 19.",
    'def mean(values):\n    """The arithmetic mean of a list."""\n    return sum(values) / len(values)\n',
    "水在标准大气压下于一百摄氏度沸腾，于零摄氏度结冰。",
)
PROBE_QUESTION = "What does it mean that water boils at 100 degrees?"
#: A difference in probability that is more than a choice between near equals.
CLEAR = 0.1
_ROW_TOKENS = 96
_GREEDY_TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """What the live model said: log probabilities [T, V] for each row, and its most likely continuation."""

    rows: list[list[int]]
    expected: list[Tensor]
    prompt: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Comparison:
    """How far an export is from the live model."""

    reader: str
    """What opened it: "transformers" or "llama.cpp"."""
    divergence: float
    """Mean KL divergence of the next token, in nats."""
    agreement: float
    """Share of positions with the same most likely next token."""
    lost: float
    """Share of positions where it prefers a token that the live model finds less likely by `CLEAR` or more."""
    tokens: int
    same_text: int
    """Length of the common beginning of the two greedy continuations, in tokens."""
    text: int
    """Length of the live model's continuation."""

    def __str__(self) -> str:
        return (
            f"{self.reader}: KL {self.divergence:.1e} nats, same best token at {self.agreement:.1%} of {self.tokens} "
            f"(clear preferences lost: {self.lost:.1%}), greedy text equal for {self.same_text} of {self.text} tokens"
        )


def make_probe(predict: Predict, tokenizer: Any, texts: Sequence[str] | None = None) -> Probe:
    """Ask the live model once. Rows are texts; where there is a chat template, a question is among them."""
    rows = [tokenizer(text)["input_ids"][:_ROW_TOKENS] for text in texts or PROBE_TEXTS]
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": PROBE_QUESTION}]
        rows.append(
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
    rows = [[int(token) for token in row] for row in rows if len(row) > 1]
    expected = [torch.log_softmax(predict(row).float().cpu(), dim=-1) for row in rows]
    return Probe(rows, expected, rows[-1], greedy(predict, rows[-1]))


def greedy(predict: Predict, prompt: Sequence[int], tokens: int = _GREEDY_TOKENS) -> list[int]:
    """The most likely continuation, token by token."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(predict(ids)[-1].argmax()))
    return ids[len(prompt) :]


def compare(reader: str, predict: Predict, probe: Probe) -> Comparison:
    """Put an export's predictions beside the live model's."""
    divergence = agreement = lost = 0.0
    for row, expected in zip(probe.rows, probe.expected, strict=True):
        found = torch.log_softmax(predict(row).float().cpu(), dim=-1)
        width = min(found.shape[-1], expected.shape[-1])
        found, expected = found[:, :width], expected[:, :width]
        divergence += float((expected.exp() * (expected - found)).sum())
        best, chosen = expected.argmax(-1), found.argmax(-1)
        agreement += float((best == chosen).sum())
        preferred = [expected.gather(-1, token[:, None]).exp() for token in (best, chosen)]
        lost += float((preferred[0] - preferred[1] >= CLEAR).sum())
    total = sum(len(row) for row in probe.rows)
    same = _same_text(predict, probe)
    return Comparison(
        reader, divergence / total, agreement / total, lost / total, total, same, len(probe.continuation)
    )


def _same_text(predict: Predict, probe: Probe) -> int:
    """Length of the common beginning of two greedy continuations. Up to the first difference both went on from the
    same tokens, so that one pass over the live model's continuation tells."""
    said = predict([*probe.prompt, *probe.continuation])[len(probe.prompt) - 1 : -1].argmax(-1).tolist()
    differs = (
        place for place, pair in enumerate(zip(said, probe.continuation, strict=True)) if pair[0] != pair[1]
    )
    return next(differs, len(said))


def torch_predictor(model: Any) -> Predict:
    """Predictions of a model in memory, in eval mode for each call; its mode stays as it was."""
    device = model.get_input_embeddings().weight.device

    def predict(ids: Sequence[int]) -> Tensor:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                tensor = torch.tensor([list(ids)], device=device)
                return model(input_ids=tensor, use_cache=False).logits[0]
        finally:
            model.train(was_training)

    return predict
