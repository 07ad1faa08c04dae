"""Which part of a checkpoint's files the system holds in memory, and how to have it let go of them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path


def evict(folder: Path) -> None:
    """Ask the system to drop a folder's files from its page cache. It may refuse (a file system in memory has nothing
    else): `cached_share` tells."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not written yet is not dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path) -> None:
    """Read a folder's files once."""
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def cached_share(folder: Path) -> float | None:
    """Of a folder's bytes, those in the page cache; None where the system does not tell."""
    there = whole = 0
    for path in _files(folder):
        pages = _pages_in_memory(path)
        if pages is None:
            return None
        there, whole = there + pages.count(1), whole + len(pages)
    return there / whole if whole else None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file() and path.stat().st_size)


def _pages_in_memory(path: Path) -> bytes | None:
    """A byte for each page of a file, 1 where it is in memory; None where that cannot be asked."""
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    if mincore is None:
        return None
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        found = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        try:
            failed = mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), found)
        finally:
            del first  # a mapping with views of it cannot be closed
    return None if failed else bytes(byte & 1 for byte in found)
