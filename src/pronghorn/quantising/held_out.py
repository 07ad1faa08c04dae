"""What quantisation does to predictions on rows that nothing was fitted to, found as the layers pass by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pronghorn.quantising.layers import Decoder

Variant = Literal["exact", "plain", "fitted"]


@dataclass(frozen=True)
class Divergence:
    """From the original model: mean KL(original ‖ other) of the next token in nats, and the share of positions with the
    same most likely token."""

    kl: float
    agreement: float

    def __str__(self) -> str:
        return f"KL {self.kl:.4f} nats, same best token at {self.agreement:.1%}"


@dataclass(frozen=True)
class Predictions:
    """Plain NF4 and what is stored, against the original, on `tokens` tokens."""

    plain: Divergence
    fitted: Divergence
    tokens: int


class HeldOut:
    """Hidden states of the same rows in the original model, one in plain NF4, and the one that is being made.

    `run` each layer while its weights are those of the variant; only this layer's are ever needed.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        first = decoder.inputs()
        self._hidden: dict[Variant, list[Tensor]] = dict.fromkeys(("exact", "plain", "fitted"), first)

    def run(self, variant: Variant, index: int) -> None:
        """Take a variant's rows through a layer."""
        self._hidden[variant] = [self.decoder.run(index, chunk) for chunk in self._hidden[variant]]

    @torch.no_grad()
    def compare(self) -> Predictions:
        """How far the other two are from the original after the last layer."""
        sums = {"plain": [0.0, 0.0], "fitted": [0.0, 0.0]}
        for place, ids in enumerate(self.decoder.chunks):
            for row in range(len(ids)):  # a row at a time: logits in fp32 are the largest tensor there is
                exact = self._log_probabilities("exact", place, row)
                for name, total in sums.items():
                    other = self._log_probabilities(name, place, row)  # type: ignore[arg-type]
                    total[0] += float((exact.exp() * (exact - other)).sum())
                    total[1] += float((exact.argmax(-1) == other.argmax(-1)).sum())
        tokens = self.decoder.ids.numel()
        plain, fitted = (Divergence(kl / tokens, same / tokens) for kl, same in sums.values())
        return Predictions(plain, fitted, tokens)

    def _log_probabilities(self, variant: Variant, place: int, row: int) -> Tensor:
        part = slice(row, row + 1)
        ids, hidden = self.decoder.chunks[place][part], self._hidden[variant][place][part]
        return self.decoder.logits(ids, hidden)[0].float().log_softmax(-1)
