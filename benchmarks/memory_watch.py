"""The most memory that other processes take while they are waited for."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

#: seconds between two looks
EVERY = 0.25
GIB = 1 << 30


class MemoryWatch:
    """Looks, in a thread, at what all visible GPUs hold; without one, at what its own process tree holds of the host.

    `peak_gib`: the most, on a GPU less what was held before; None where the system does not tell.
    """

    def __init__(self) -> None:
        self.peak_gib: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._on_gpu = gpu_bytes() is not None
        self._before = (gpu_bytes() or 0) if self._on_gpu else 0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            found = gpu_bytes() if self._on_gpu else host_bytes_of_descendants(os.getpid())
            if found is not None:
                self.peak_gib = max(self.peak_gib or 0.0, (found - self._before) / GIB)


def gpu_bytes() -> int | None:
    """What is held on all GPUs that CUDA_VISIBLE_DEVICES lets through; None without nvidia-smi or a GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query += ["-i", visible]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return sum(int(line) for line in lines) << 20 if lines else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def host_bytes_of_descendants(root: int) -> int | None:
    """What the processes below one hold, shared pages by their share; None where the system does not tell."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # "PID (NAME) STATE PARENT …"; a name may hold anything.
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    if not children:
        return None
    total, waiting = 0, list(children.get(root, []))
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total
