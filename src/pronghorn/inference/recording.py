"""CUDA graphs of what can be done without them, too."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

logger = logging.getLogger("pronghorn")

#: torch takes one recording at a time in a process, on one stream of its own; models may answer in several threads
_ALONE = threading.Lock()


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: object) -> Iterator[None]:
    """What is launched inside becomes the graph."""
    # "relaxed": other threads may allocate meanwhile.
    with _ALONE, torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
        yield


def pool_beside(graphs: Iterable[torch.cuda.CUDAGraph | None], pool: object) -> object:
    """The pool that those graphs have, for one more; a new one where none of them is left.

    torch refuses a pool that has lost all of its graphs while something of it is held still, as cuBLAS' workspace is
    that was first wanted in a recording.
    """
    return pool if any(graph is not None for graph in graphs) else torch.cuda.graph_pool_handle()


def recorded(
    compute: Callable[[], Tensor], pool: object, what: str
) -> tuple[torch.cuda.CUDAGraph | None, Tensor | None]:
    """A graph of what has been computed before, and where it leaves the result; (None, None) where that fails, as for
    lack of memory, and everything is as it was.

    Args:
        pool: of the graph's memory. what: is computed, for the log.
    """
    before = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with recording(graph, pool):
            result = compute()
    except RuntimeError as error:
        torch.cuda.set_stream(before)
        reason = str(error).partition("\n")[0]
        logger.warning(
            "pronghorn: %s could not be recorded (%s); they are launched one by one from here on",
            what,
            reason,
        )
        return None, None
    return graph, result
