"""Rows of `SpeechRows` to one flat stream of documents, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pronghorn.data.collator import Collator


@dataclass(frozen=True)
class SpeechCollator:
    """`pronghorn.data.Collator`'s batch with `codes` int64 [1, K, T], `frame_rows` int64 [n], the positions before
    frames that are learned, and `frames`, their number.

    Args:
        semantic: first and last semantic token.
    """

    semantic: tuple[int, int]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = Collator(pad_token_id=0)(
            [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        )
        first, last = self.semantic
        labels = batch["labels"][0].numpy()
        frame_rows = np.flatnonzero((labels[1:] >= first) & (labels[1:] <= last)).astype(np.int64)
        codes = np.concatenate([np.asarray(row["codes"], dtype=np.int64) for row in rows], axis=1)
        return {
            **batch,
            "codes": torch.from_numpy(codes)[None],
            "frame_rows": torch.from_numpy(frame_rows),
            "frames": len(frame_rows),
        }
