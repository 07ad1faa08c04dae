"""Recordings of several threads, without a GPU."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import torch

from pronghorn.inference.recording import recorded


def test_one_at_a_time(monkeypatch):
    """Two models that answer in two threads: torch records for all on one stream."""
    inside, most = [], []

    @contextmanager
    def graph(of, pool, capture_error_mode):
        assert capture_error_mode == "relaxed"
        inside.append(of)
        most.append(len(inside))
        time.sleep(0.02)
        yield
        inside.remove(of)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    given = torch.ones(1)
    threads = [threading.Thread(target=recorded, args=(lambda: given, "pool", "it")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
