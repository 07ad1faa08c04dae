"""Drawing tokens as recorded CUDA graphs: some fifty small launches a token, which take a host half a millisecond.

One graph for each number of rows and kind of cuts, recorded when it is wanted a second time. Logits and the rows'
settings are copied to where it reads them. A repetition penalty is not recorded: it reads what each row has seen.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from pronghorn.inference.choosing import Kind, choice_from, chosen_by_launches, packed
from pronghorn.inference.moving import on_device
from pronghorn.inference.recording import recorded
from pronghorn.inference.sequences import Sequence
from pronghorn.kernels.sampling import choose

#: rows at most, and how many graphs: each has a copy of its rows' logits
MOST_ROWS = 16
MOST_KEPT = 16


class Chooser:
    """Chooses the tokens of a batch.

    Args:
        records: whether there is a GPU to record for.
    """

    def __init__(self, records: bool) -> None:
        self._pool: object = torch.cuda.graph_pool_handle() if records else None
        self._draws: dict[tuple[int, Kind], _Draw] = {}

    def __call__(self, sequences: Many[Sequence], logits: Tensor) -> Tensor:
        """The next token of each sequence, int64 [B], for fp32 logits [B, V]; good until the next call."""
        draw = self._draw_of(sequences, logits)
        if draw is None or not self._is_recorded(draw):
            return chosen_by_launches(sequences, logits)
        return draw.replay(packed(sequences), logits)

    def _draw_of(self, sequences: Many[Sequence], logits: Tensor) -> _Draw | None:
        """None where nothing is recorded."""
        penalised = any(s.request.sampling.repetition_penalty != 1 for s in sequences)
        if self._pool is None or penalised or len(sequences) > MOST_ROWS:
            return None
        key = len(sequences), Kind.of(sequences)
        draw = self._draws.get(key)
        if draw is None and len(self._draws) < MOST_KEPT:
            draw = self._draws[key] = _Draw(logits, key[1])
        return draw

    def _is_recorded(self, draw: _Draw) -> bool:
        draw.uses += 1
        if draw.graph is None and draw.uses > 1:
            draw.graph, draw.chosen = recorded(draw.compute, self._pool, "draws of tokens")
            if draw.graph is None:
                self._pool = None
                self._draws.clear()
        return draw.graph is not None


class _Draw:
    """One number of rows and kind of cuts."""

    def __init__(self, logits: Tensor, kind: Kind) -> None:
        self.logits, self.kind, self.uses = torch.zeros_like(logits), kind, 0
        self.columns = torch.zeros(6, len(logits), dtype=torch.int32, device=logits.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.chosen: Tensor | None = None

    def compute(self) -> Tensor:
        return choose(self.logits, choice_from(self.columns, self.kind))

    def replay(self, columns: Tensor, logits: Tensor) -> Tensor:
        self.logits.copy_(logits)
        self.columns.copy_(on_device(columns, torch.int32, self.columns.device))
        assert self.graph is not None and self.chosen is not None
        self.graph.replay()
        return self.chosen
