"""What loading a model can begin before its turn comes: threads do it, and nothing depends on them.

Whatever goes wrong in such a thread goes wrong again where the file or the GPU is used, and is raised there; here it is
logged for whoever looks for lost seconds.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from pronghorn.memory.host import available_host_bytes

logger = logging.getLogger("pronghorn")

#: bytes that the system is asked for at a time: between two it is seen that nobody waits for them any more
_PIECE = 64 << 20
#: Of the host memory that is available, files read ahead take at most this share: else the last push out the first.
_SHARE = 0.5


@contextmanager
def begun_early(files: Sequence[Path], device: torch.device | None) -> Iterator[None]:
    """While the block runs, the system reads files into its page cache, and a GPU gets its context (0.3 s).

    Neither holds Python's lock, and what a block does before it reads weights, importing above all, hardly lets go of
    it. The files of a block that ends early are not read to their end.

    Args:
        files: what will be read in the block, in this order.
        device: where tensors will be made in it; None for no GPU.
    """
    over = threading.Event()
    if hasattr(os, "posix_fadvise"):
        _start(partial(_have_read, files, over))
    waking = None if device is None else _start(partial(torch.empty, 1, device=device))
    try:
        yield
    finally:
        over.set()  # nobody waits for the files: a slow disk may be busy with a piece for seconds
        if waking is not None:
            waking.join()


def _have_read(files: Sequence[Path], over: threading.Event) -> None:
    """Ask the system for the files' pages, unless they are too many for its memory."""
    if sum(file.stat().st_size for file in files) > _SHARE * available_host_bytes():
        return
    for path in files:
        with path.open("rb") as file:
            for at in range(0, path.stat().st_size, _PIECE):
                if over.is_set():
                    return
                os.posix_fadvise(file.fileno(), at, _PIECE, os.POSIX_FADV_WILLNEED)


def _start(task: Callable[[], object]) -> threading.Thread | None:
    """None where the system gives no thread."""
    thread = threading.Thread(target=_try, args=(task,), name="pronghorn-ahead", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        _log(error)
        return None
    return thread


def _try(task: Callable[[], object]) -> None:
    try:
        task()
    except Exception as error:
        _log(error)


def _log(error: Exception) -> None:
    logger.debug("pronghorn: begun early without success: %s: %s", type(error).__name__, error)
