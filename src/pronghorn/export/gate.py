"""The gate of exports: an exported model, opened by what will run it, must predict what the live model predicts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pronghorn.engine import base_causal_lm, evaluating
from pronghorn.memory.host import available_host_bytes
from pronghorn.weights import (
    BitsAndBytesInt8Weight,
    Fp8FourBitWeight,
    Fp8Weight,
    Int8Weight,
    read_weight,
)

logger = logging.getLogger("pronghorn")

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


#: Rows of arbitrary tokens where there is no tokenizer.
_BLIND_ROWS, _BLIND_SEED = 4, 0


@dataclass(frozen=True)
class Limits:
    """What an export may differ by. Wide at few bits, where small models suffer most; whether adapters are in it is
    looked for weight by weight."""

    divergence: float
    """Most mean KL divergence, in nats."""
    lost: float
    """Most clear preferences lost (see `Comparison`)."""

    def against(self, model: Any) -> Limits:
        """Wider where the live model rounds what it multiplies, which its export does not."""
        # PEFT's wrappers are called as what they wrap.
        plain = (module for module in model.modules() if not hasattr(module, "base_layer"))
        kinds = {type(read_weight(module)) for module in plain}
        extra = [_LIVE_ROUNDING[kind] for kind in kinds & _LIVE_ROUNDING.keys()]
        return Limits(
            self.divergence + sum(item.divergence for item in extra), self.lost + sum(i.lost for i in extra)
        )


#: What a model's products differ by from those of its weights, where it multiplies in 8 bits.
_LIVE_ROUNDING: dict[type, Limits] = {
    Int8Weight: Limits(0.03, 0.03),
    BitsAndBytesInt8Weight: Limits(0.03, 0.03),
    Fp8Weight: Limits(0.15, 0.10),
    Fp8FourBitWeight: Limits(0.15, 0.10),
}


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


@dataclass
class Checked:
    """What the gate found about one export: a file, or a folder."""

    name: str
    comparisons: list[Comparison] = field(default_factory=list)
    adapted: int = 0
    """Adapted weights that were looked for in it."""
    problems: list[str] = field(default_factory=list)
    bit_for_bit: bool = False
    """Its tensors were compared themselves, which leaves nothing to predictions."""

    @property
    def passed(self) -> bool:
        return not self.problems

    def judge(self, found: Comparison, limits: Limits) -> None:
        """Keep a comparison; one beyond the limits is a problem."""
        self.comparisons.append(found)
        if not found.divergence <= limits.divergence:
            self.problems.append(
                f"KL {found.divergence:.2g} nats with {found.reader}, at most {limits.divergence:g} expected"
            )
        elif found.lost > limits.lost:
            self.problems.append(
                f"{found.lost:.1%} of clear preferences lost with {found.reader}, at most {limits.lost:.0%} expected"
            )

    def __str__(self) -> str:
        compared = "every tensor is the trained one" if self.bit_for_bit and self.passed else "not compared"
        found = [str(item) for item in self.comparisons] or [compared]
        if self.adapted:
            found.append(f"{self.adapted} adapted weights looked for")
        return f"{self.name}: {'; '.join([*found, *self.problems])}"


def make_probe(predict: Predict, tokenizer: Any, texts: Sequence[str] | None = None) -> Probe:
    """Ask the live model once. Rows are texts; where there is a chat template, a question is among them."""
    rows = [tokenizer(text)["input_ids"][:_ROW_TOKENS] for text in texts or PROBE_TEXTS]
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": PROBE_QUESTION}]
        try:
            asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
            rows.append(asked["input_ids"])
        except Exception as error:  # a template raises what it likes for turns it does not take
            logger.info("pronghorn: no question is among the texts compared: %s", error)
    return _ask(predict, [[int(token) for token in row] for row in rows if len(row) > 1])


def make_blind_probe(predict: Predict, vocabulary: int) -> Probe:
    """As `make_probe`, on arbitrary tokens: for a model without a tokenizer."""
    generator = torch.Generator().manual_seed(_BLIND_SEED)
    return _ask(predict, torch.randint(vocabulary, (_BLIND_ROWS, _ROW_TOKENS), generator=generator).tolist())


def _ask(predict: Predict, rows: list[list[int]]) -> Probe:
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


def place_for_second(model: Any, element_bytes: float) -> torch.device | None:
    """Where a second model of these sizes has room: beside the first, else the host; None where neither has.

    Args:
        element_bytes: bytes a weight takes there.
    """
    base = base_causal_lm(model)
    size = int(_elements(base) * element_bytes)
    device = base.get_input_embeddings().weight.device
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 1.2 * size + (1 << 30):
        return device
    return torch.device("cpu") if available_host_bytes() > 1.2 * size + (1 << 28) else None


def _elements(base: Any) -> int:
    """Weights of a model. Four-bit ones lie two to a byte."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in base.parameters())


def torch_predictor(model: Any) -> Predict:
    """Predictions of a model in memory, in eval mode for each call; its mode stays as it was."""
    device = model.get_input_embeddings().weight.device

    def predict(ids: Sequence[int]) -> Tensor:
        with evaluating(model), torch.no_grad():
            tensor = torch.tensor([list(ids)], device=device)
            return model(input_ids=tensor, use_cache=False).logits[0]  # type: ignore[no-any-return]

    return predict
