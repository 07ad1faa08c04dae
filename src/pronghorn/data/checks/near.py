"""Rows that are nearly the same: MinHash with one permutation, and banded search.

A text is the set of its shingles (8 bytes each, white space and case aside). The similarity of two texts is the share
of shingles they have in common (Jaccard). A signature keeps the smallest hash in each of 128 equal parts of the hash
range; two signatures agree in about as many of them as the texts are similar (standard error 0.03 at 0.85).

Bins: Li, Owen, Zhang, "One Permutation Hashing", 2012; empty ones: Shrivastava, Li, "Densifying One Permutation
Hashing", 2014 (here the next full bin's value, mixed with the distance).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BINS = 128
BANDS = 16
SHINGLE = 8
#: Rows with at least this share of shingles in common are told.
SIMILAR = 0.8
#: Shorter texts (bytes) are alike by nature: "yes", "I don't know".
SHORTEST = 64
#: Bytes of a text that are looked at.
LONGEST = 1 << 16
_CHUNK = 1 << 14

_EDGES = np.arange(BINS, dtype=np.uint64) << np.uint64(57)


def signature(text: str) -> NDArray[np.uint16] | None:
    """BINS values of 16 bits; None for a text too short to say anything."""
    data = " ".join(text[:LONGEST].casefold().split()).encode("utf-8", "replace")[:LONGEST]
    if len(data) < SHORTEST:
        return None
    count = len(data) - SHINGLE + 1
    # Eight bytes are a number: every shingle, one byte further each.
    shingles = np.ndarray((count,), dtype="<u8", buffer=data, strides=(1,))
    hashes = _mixed(shingles.astype(np.uint64))
    hashes.sort()
    first = np.searchsorted(hashes, _EDGES)
    edges = np.append(first, count)
    full = edges[1:] > edges[:-1]
    values = hashes[np.minimum(first, count - 1)]
    # An empty bin takes the value of the next full one (cyclically), and how far that is.
    positions = np.flatnonzero(full)
    following = np.searchsorted(positions, np.arange(BINS))
    source = positions[following % len(positions)]
    distance = (source - np.arange(BINS)) % BINS
    return (_mixed(values[source] + distance.astype(np.uint64)) & np.uint64(0xFFFF)).astype(np.uint16)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of a number depends on every bit of the result (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Signatures:
    """Signatures of many rows, 256 bytes each; beyond `limit` rows no more are kept, and `left_out` counts them."""

    def __init__(self, limit: int = 1_000_000) -> None:
        self.limit, self.left_out = limit, 0
        self._chunks: list[NDArray[np.uint16]] = []
        self._places: list[NDArray[np.int64]] = []
        self._count = 0

    def add(self, text: str, place: int) -> None:
        found = signature(text)
        if found is None:
            return
        if self._count >= self.limit:
            self.left_out += 1
            return
        at = self._count % _CHUNK
        if at == 0:
            self._chunks.append(np.empty((_CHUNK, BINS), dtype=np.uint16))
            self._places.append(np.empty(_CHUNK, dtype=np.int64))
        self._chunks[-1][at] = found
        self._places[-1][at] = place
        self._count += 1

    def pairs(self) -> Iterator[tuple[int, int, float]]:
        """(place, earlier place, similarity) of every row that is nearly the same as an earlier one, in order.

        Of rows with one band in common, each is compared with the first and with the one before it.
        """
        best: dict[int, tuple[int, float]] = {}
        per_band = BINS // BANDS
        for band in range(BANDS):
            columns = slice(band * per_band, (band + 1) * per_band)
            keys = np.empty(self._count, dtype=np.uint64)
            for index, chunk in enumerate(self._chunks):
                start = index * _CHUNK
                rows = chunk[: self._count - start, columns]
                keys[start : start + len(rows)] = _keyed(rows)
            order = np.argsort(keys, kind="stable")
            same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
            first, previous = -1, -2
            for at in same.tolist():
                if at != previous + 1:
                    first = int(order[at - 1])
                previous = at
                row = int(order[at])
                for other in {first, int(order[at - 1])}:
                    self._compare(row, other, best)
        for row in sorted(best):
            other, similarity = best[row]
            yield self._place(row), self._place(other), similarity

    def _compare(self, row: int, other: int, best: dict[int, tuple[int, float]]) -> None:
        known = best.get(row)
        if known is not None and known[0] == other:
            return
        similarity = float((self._row(row) == self._row(other)).mean())
        if similarity >= SIMILAR and (known is None or similarity > known[1]):
            best[row] = (other, similarity)

    def _row(self, index: int) -> NDArray[np.uint16]:
        return self._chunks[index // _CHUNK][index % _CHUNK]

    def _place(self, index: int) -> int:
        return int(self._places[index // _CHUNK][index % _CHUNK])


def _keyed(rows: NDArray[np.uint16]) -> NDArray[np.uint64]:
    """One number for each band."""
    key = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        key = _mixed(key + column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return key
