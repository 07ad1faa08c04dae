"""How well a model does on held-back rows: their loss, and retrieval or rank correlation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pronghorn.embedding.batches import TokenPair, facts_of, texts_of
from pronghorn.embedding.losses import Objective
from pronghorn.embedding.metrics import retrieval, spearman
from pronghorn.embedding.model import vectors_of
from pronghorn.embedding.vectors import to_device


def evaluate_pairs(
    model: Any, rows: Sequence[TokenPair], objective: Objective, rows_of_batch: int
) -> dict[str, float]:
    """The mean loss of batches of the rows in their order, and

    without scores: `metrics.retrieval` of every anchor's text among all positives and negatives of the rows;
    with scores: `spearman` of cosines and scores.
    """
    places: dict[int, int] = {}
    texts: list[np.ndarray] = []
    for text in (text for row in rows for text in row.texts):  # equal texts are one array
        if id(text) not in places:
            places[id(text)] = len(texts)
            texts.append(text)
    vectors = normalize(vectors_of(model, texts), dim=-1)
    found = {"loss": _loss(rows, vectors, places, objective, rows_of_batch)}
    if rows[0].score is not None:
        anchors, positives = (vectors[[places[id(row.texts[side])] for row in rows]] for side in (0, 1))
        scores = torch.tensor([row.score for row in rows])
        return found | {"spearman": spearman((anchors * positives).sum(-1), scores)}
    queries, documents, belong = _sides(rows, places)
    return found | dict(retrieval(vectors[queries], vectors[documents], belong))


def _loss(
    rows: Sequence[TokenPair],
    vectors: Tensor,
    places: dict[int, int],
    objective: Objective,
    rows_of_batch: int,
) -> float:
    losses = []
    for start in range(0, len(rows), rows_of_batch):
        part = rows[start : start + rows_of_batch]
        found = vectors[[places[id(text)] for text in texts_of(part)]]
        losses.append(objective(found, to_device(facts_of(part), vectors.device)) * len(part))
    return float(torch.stack(losses).sum()) / len(rows)


def _sides(rows: Sequence[TokenPair], places: dict[int, int]) -> tuple[list[int], list[int], list[set[int]]]:
    """(queries, documents, the numbers of the documents that belong to each query); every text once on its side."""
    queries: dict[int, int] = {}
    documents: dict[int, int] = {}
    found: list[int] = []
    belong: defaultdict[int, set[int]] = defaultdict(set)
    for row in rows:
        queries.setdefault(row.keys[0], places[id(row.texts[0])])
        for key, text in zip(row.keys[1:], row.texts[1:], strict=True):
            if key not in documents:
                documents[key] = len(found)
                found.append(places[id(text)])
        belong[row.keys[0]].add(documents[row.keys[1]])
    return list(queries.values()), found, [belong[key] for key in queries]
