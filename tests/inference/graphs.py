"""A stand-in for CUDA graphs on a CPU: what was recorded is computed again, into the same memory."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from itertools import count

import torch

from pronghorn.inference import chooser, prompts, recording


class Graphs:
    """Prompts and draws of tokens are recorded without a GPU.

    Attributes:
        memory: whether there is any for a recording. made: what was recorded. replayed: how often any was replayed.
        factor: of what replays of prompts give.
    """

    def __init__(self):
        self.memory, self.made, self.replayed, self.stream = True, [], 0, "first"
        self.under_way, self.factor = None, 1.0
        #: by pool, its graphs: one that has lost all of them is taken no more
        self.pools = {}

    def put_in(self, monkeypatch):
        cuda, played = torch.cuda, self

        class Graph:
            def replay(self):
                played.replayed += 1
                result, compute, what = self.recorded
                result.copy_(compute() * played.factor if what == "prompts" else compute())

        @contextmanager
        def recording_of(graph, pool, capture_error_mode):
            assert pool.startswith("pool")
            if not self.memory:
                self.stream = "another"
                raise torch.OutOfMemoryError("no memory left")
            gc.collect()
            graphs = self.pools.get(pool)
            if graphs is not None and not graphs:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            self.pools.setdefault(pool, weakref.WeakSet()).add(graph)
            self.under_way = graph
            yield
            self.under_way = None

        def recorded(compute, pool, what):
            def once():
                found = compute()
                self.under_way.recorded = found, compute, what
                return found.fill_(-1)  # nothing is computed by a recording

            found = recording.recorded(once, pool, what)
            self.made += [what] if found[0] else []
            return found

        monkeypatch.setattr(cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(cuda, "graph", recording_of)
        monkeypatch.setattr(cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        numbers = count()
        monkeypatch.setattr(cuda, "graph_pool_handle", lambda: f"pool {next(numbers)}")
        for module, name in ((prompts, "Prompts"), (chooser, "Chooser")):
            monkeypatch.setattr(module, "recorded", recorded)
            made = getattr(module, name).__init__
            monkeypatch.setattr(
                getattr(module, name),
                "__init__",
                lambda self, *given, records, made=made: made(self, *given, records=True),
            )
