"""Rows of `SpeechRows` to one flat stream of documents, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pronghorn.data.budgets import Budgets, token_budget
from pronghorn.data.collator import Collator


@dataclass(frozen=True)
class SpeechCollator:
    """`pronghorn.data.Collator`'s batch with `codes` int64 [1, K, T], `frame_rows` int64 [n], the positions before
    frames that are learned, and `frames`, their number.

    Args:
        semantic: first and last semantic token.
        budgets: round all sizes up for steps of static shape; what fills them up is not learned.
    """

    semantic: tuple[int, int]
    budgets: Budgets | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = Collator(pad_token_id=0, budgets=self.budgets)(
            [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        )
        first, last = self.semantic
        labels = batch["labels"][0].numpy()
        frame_rows = np.flatnonzero((labels[1:] >= first) & (labels[1:] <= last)).astype(np.int64)
        frames, codes = len(frame_rows), np.concatenate([row["codes"] for row in rows], axis=1)
        codes = np.pad(np.asarray(codes, dtype=np.int64), ((0, 0), (0, len(labels) - codes.shape[1])))
        if self.budgets is not None and frames:
            # A frame is K tokens of the fast transformer: sizes in smaller steps than those of rows of a loss. The
            # last position predicts nothing.
            missing = min(token_budget(frames), len(labels)) - frames
            frame_rows = np.pad(frame_rows, (0, max(missing, 0)), constant_values=len(labels) - 1)
        return {
            **batch,
            "codes": torch.from_numpy(codes)[None],
            "frame_rows": torch.from_numpy(frame_rows),
            "frames": frames,
        }
