"""From the requests of a batch to how each row's token is chosen, and to what is told about it."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.inference.moving import on_device, to_host
from pronghorn.inference.requests import Token
from pronghorn.inference.sequences import Sequence
from pronghorn.kernels.sampling import Choice, choose, uniform


def is_plain(sequences: Many[Sequence]) -> bool:
    """Whether every row takes the largest logit, and nothing is told about it."""
    params = [sequence.request.sampling for sequence in sequences]
    return all(p.temperature == 0 and p.repetition_penalty == 1 and p.logprobs is None for p in params)


class Kind(NamedTuple):
    """What `kernels.sampling.Choice` has to say of a batch as a whole."""

    most: int
    draws: bool
    cuts: bool

    @staticmethod
    def of(sequences: Many[Sequence]) -> Kind:
        params = [sequence.request.sampling for sequence in sequences]
        return Kind(
            most=max(p.top_k for p in params) if all(p.top_k or not p.temperature for p in params) else 0,
            draws=any(p.temperature > 0 for p in params),
            cuts=any(p.top_k or p.top_p < 1 or p.min_p for p in params),
        )


def packed(sequences: Many[Sequence]) -> Tensor:
    """int32 [6, B] on the host: temperature, top_p, min_p, penalty and the place's random number of each row as the
    bits of fp32, and top_k. One copy takes them to the device."""
    params = [sequence.request.sampling for sequence in sequences]
    numbers = [
        uniform(s.seed, s.generated + s.in_flight) if s.request.sampling.temperature else 0.0
        for s in sequences
    ]
    wide = torch.tensor(
        [
            [p.temperature for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [p.repetition_penalty for p in params],
            numbers,
        ],
        dtype=torch.float32,
    )
    return torch.cat([wide.view(torch.int32), torch.tensor([[p.top_k for p in params]], dtype=torch.int32)])


def choice_from(columns: Tensor, kind: Kind, seen: Tensor | None = None) -> Choice:
    """How tokens are chosen, of what `packed` gave, on the device."""
    temperature, top_p, min_p, penalty, numbers = columns[:5].view(torch.float32).unbind(0)
    return Choice(temperature, columns[5], top_p, min_p, penalty, numbers, seen, *kind)


def choice_of(sequences: Many[Sequence], device: torch.device, vocabulary: int) -> Choice:
    """How the next token of each sequence is chosen; its random number is that of its place in the answer."""
    columns = on_device(packed(sequences), torch.int32, device)
    return choice_from(columns, Kind.of(sequences), _seen(sequences, device, vocabulary))


def chosen_by_launches(sequences: Many[Sequence], logits: Tensor) -> Tensor:
    """The next token of each sequence, int64 [B], for fp32 logits [B, V]."""
    return choose(logits, choice_of(sequences, logits.device, logits.shape[1]))


def next_tokens(sequences: Many[Sequence], logits: Tensor) -> list[Token]:
    """The next token of each sequence for fp32 logits [B, V]."""
    if is_plain(sequences):
        return [Token(token) for token in logits.argmax(-1).tolist()]
    chosen = chosen_by_launches(sequences, logits)
    tops = Tops.of(sequences, logits, chosen)
    tokens = [Token(token) for token in chosen.tolist()]  # waits for what `tops` copies, too
    return tokens if tops is None else tops.tell(sequences, tokens)


class Tops:
    """Log-probabilities of a step's tokens and of the most likely ones, on their way to the host.

    Args:
        logits: fp32 [B, V], before temperature, penalty and cuts. chosen: int64 [B].
        most: how many of the most likely ones a row asks for at most.
    """

    def __init__(self, logits: Tensor, chosen: Tensor, most: int) -> None:
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(min(max(most, 1), logits.shape[1]))
        self.own = to_host(logprobs.gather(1, chosen[:, None]).squeeze(1))
        self.best, self.best_ids = to_host(best.values), to_host(best.indices)

    @staticmethod
    def of(sequences: Many[Sequence], logits: Tensor, chosen: Tensor) -> Tops | None:
        """What the rows' requests ask for; None where none does."""
        asked = [n for s in sequences if (n := s.request.sampling.logprobs) is not None]
        return Tops(logits, chosen, max(asked)) if asked else None

    def tell(self, sequences: Many[Sequence], tokens: Many[Token]) -> list[Token]:
        """The tokens with the log-probabilities that their requests ask for; the stream must have come so far."""
        told = []
        rows = zip(self.own.tolist(), self.best.tolist(), self.best_ids.tolist(), strict=True)
        for sequence, token, (own, best, ids) in zip(sequences, tokens, rows, strict=True):
            count = sequence.request.sampling.logprobs
            top = tuple(zip(ids, best, strict=True))[:count]
            told.append(token if count is None else Token(token.id, own, top))
        return told


def _seen(sequences: Many[Sequence], device: torch.device, vocabulary: int) -> Tensor | None:
    """bool [B, V]: the tokens of each row that has a repetition penalty."""
    if all(s.request.sampling.repetition_penalty == 1 for s in sequences):
        return None
    seen = torch.zeros(len(sequences), vocabulary, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        if sequence.request.sampling.repetition_penalty != 1:
            seen[row, sequence.tokens] = True
            seen[row, list(sequence.also_seen)] = True
    return on_device(seen, torch.bool, device)
