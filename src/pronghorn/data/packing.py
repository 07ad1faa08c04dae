"""Best-fit-decreasing packing: documents into rows of a fixed capacity, none split."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents of the given lengths; returns rows of document indices.

    Longest first, each document goes to the open row that it fills best, of several to the one that has had that
    space for longest; at most 11/9 of the optimal number of rows, plus one. Deterministic, O(n log n): open rows are
    grouped by their free space, of which there are at most `capacity` different ones.

    The rows come in the order of their first document and the documents of a row in theirs, so packing keeps as much
    of the data's order as it can.

    Raises:
        ValueError: a length below 1 or above the capacity.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"document {index} has length {length}; it must be between 1 and {capacity}")
    rows: list[list[int]] = []
    rows_with: defaultdict[int, deque[int]] = defaultdict(deque)  # free space -> rows
    spaces: list[int] = []  # the free spaces that some row has, sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = rows_with[space].popleft()
            if not rows_with[space]:
                del spaces[at]
        rows[row].append(index)
        left = space - length
        if left:
            if not rows_with[left]:
                insort(spaces, left)
            rows_with[left].append(row)
    for documents in rows:
        documents.sort()
    rows.sort(key=lambda documents: documents[0])
    return rows
