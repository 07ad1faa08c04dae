"""cuDNN attention plans for ragged token streams: what a plan is built for, how, and how one is run.

Source of the graphs: the operations `sdpa` and `sdpa_backward` of NVIDIA's cudnn-frontend, with ragged offsets. Inputs
keep their [T, heads, D] layout: cuDNN is told the shape [B, heads, S, D] of B documents of up to S tokens, the
strides inside a document, the documents' lengths, and where each begins (in elements, int64).

A plan serves every stream that fits its geometry, so geometries are rounded up (`bucket`): a plan takes 0.1 to 2 s
to build, and real batches differ in all three of documents, longest document and tokens. Plans are never dropped: a
captured step may hold their kernels.

Documents of one length that needs no rounding are `dense`: cuDNN is told their number and length and nothing else. That
takes 255 and 881 µs where ragged ones take 279 and 956 (4 × 2,048 tokens of 8B, H200), and two thirds of the workspace.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("pronghorn")

_NAMES = (
    "q", "k", "v", "o", "stats", "do", "dq", "dk", "dv", "lengths",
    "q_offset", "k_offset", "v_offset", "o_offset", "stats_offset", "dk_offset",
)  # fmt: skip
_UID = {name: number for number, name in enumerate(_NAMES, start=1)}


@dataclass(frozen=True)
class Geometry:
    """What a plan depends on. B documents of up to S tokens each, at most `tokens` in all; rows are strides of tokens.

    `tokens` and `deterministic` matter to the backward plan only; `dense`: all documents have S tokens.
    """

    device: torch.device
    dtype: torch.dtype
    documents: int
    longest: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    q_row: int
    k_row: int
    v_row: int
    scale: float
    window: int | None
    deterministic: bool = False
    dense: bool = False

    @property
    def out_row(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_row(self) -> int:
        """Stride of dk and dv, which are contiguous."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Plan:
    """A built graph and the bytes it works in."""

    graph: Any
    workspace: int


def bucket(documents: int, longest: int, tokens: int) -> tuple[int, int, int]:
    """The rounded numbers of documents, tokens of the longest document, and tokens.

    Documents and lengths go up to a power of two: empty documents and rows past a document's end cost a few per
    cent. Tokens size the backward workspace (3 · 4 bytes · tokens · heads · D), so they go up by a quarter at most, and
    by less than 8,192 where there are so many that this workspace is the largest thing there.
    """
    step = min(max(1024, 1 << max(0, (tokens - 1).bit_length() - 3)), 8192)
    return _power_of_two(documents), longest_bucket(longest), -(-tokens // step) * step


def longest_bucket(longest: int) -> int:
    """The rounded number of tokens of the longest document."""
    return max(128, _power_of_two(longest))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


class Plans:
    """The plans of this process, the cuDNN handle of each device, and what building them cost."""

    def __init__(self) -> None:
        self.built: dict[tuple[str, Geometry], Plan | None] = {}
        self.seconds = 0.0
        self._handles: dict[torch.device, int] = {}
        self._told: set[str] = set()
        # A handle serves one thread at a time: forward and autograd's backward run in different ones.
        self._lock = threading.RLock()

    def get(self, stage: str, geometry: Geometry, build: Callable[[Any, Any, Geometry], Any]) -> Plan | None:
        """The plan for a stage ("forward", "backward"); None when cuDNN has none, whose reason is told once."""
        key = (stage, geometry)
        if key not in self.built:
            with self._lock, torch.cuda.device(geometry.device):
                if key not in self.built:
                    self.built[key] = self._make(stage, geometry, build)
        return self.built[key]

    def _make(
        self, stage: str, geometry: Geometry, build: Callable[[Any, Any, Geometry], Any]
    ) -> Plan | None:
        cudnn = frontend()
        begin = time.perf_counter()
        try:
            graph = build(cudnn, self._handle(geometry.device), geometry)
            plan = Plan(graph, graph.get_workspace_size())
        # The frontend's own error class is no RuntimeError, and which calls refuse a geometry differs by version.
        except Exception as error:
            reason = f"cuDNN has no {stage} attention plan for {geometry}: {error}"
            if reason not in self._told:
                self._told.add(reason)
                logger.warning("pronghorn: FlashAttention-2 runs instead: %s", reason)
            return None
        seconds = time.perf_counter() - begin
        before, self.seconds = self.seconds, self.seconds + seconds
        logger.info("pronghorn: %s attention plan in %.2f s: %s", stage, seconds, geometry)
        if before <= 20 < self.seconds:
            logger.warning(
                "pronghorn: %d attention plans took %.0f s to build so far; batches of one size (a token budget) "
                "need fewer",
                len(self.built),
                self.seconds,
            )
        return plan

    def run(self, plan: Plan, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Enqueue a plan on the current stream. The workspace is torch's, so a captured graph's pool holds it."""
        workspace = torch.empty(max(plan.workspace, 1), dtype=torch.uint8, device=device)
        pointers = {_UID[name]: tensor for name, tensor in tensors.items()}
        with self._lock, torch.cuda.device(device):
            handle = self._handle(device)
            frontend().set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
            plan.graph.execute(pointers, workspace, handle=handle)

    def _handle(self, device: torch.device) -> Any:
        if device not in self._handles:
            self._handles[device] = frontend().create_handle()
        return self._handles[device]


PLANS = Plans()


@lru_cache(maxsize=1)
def frontend() -> Any:
    """The module of `nvidia-cudnn-frontend`.

    Raises:
        ImportError, OSError, AssertionError: it is not installed, or finds no single libcudnn.
    """
    return importlib.import_module("cudnn")


def build_forward(cudnn: Any, handle: Any, g: Geometry) -> Any:
    """Graph of (out, stats) = attention(q, k, v)."""
    graph, kind, integers = _new_graph(cudnn, handle, g)
    q, k, v = _inputs(graph, kind, integers, g)
    out, stats = graph.sdpa(name="sdpa_forward", q=q, k=k, v=v, generate_stats=True, **_mask(graph, cudnn, g))
    out.set_uid(_UID["o"]).set_output(True).set_dim(_dim(g, g.heads)).set_stride(_stride(g, g.out_row))
    _place(out, _offset(graph, integers, g, "o_offset"))
    stats.set_uid(_UID["stats"]).set_output(True).set_data_type(cudnn.data_type.FLOAT)
    stats.set_dim(_stats_dim(g)).set_stride(_stats_stride(g))
    _place(stats, _offset(graph, integers, g, "stats_offset"))
    return _finish(cudnn, graph)


def build_backward(cudnn: Any, handle: Any, g: Geometry) -> Any:
    """Graph of (dq, dk, dv) from q, k, v, out, dout and stats."""
    graph, kind, integers = _new_graph(cudnn, handle, g)
    q, k, v = _inputs(graph, kind, integers, g)
    o_offset = _offset(graph, integers, g, "o_offset")
    out, dout = (
        graph.tensor(uid=_UID[name], dim=_dim(g, g.heads), stride=_stride(g, g.out_row), data_type=kind)
        for name in ("o", "do")
    )
    stats = graph.tensor(
        uid=_UID["stats"], dim=_stats_dim(g), stride=_stats_stride(g), data_type=cudnn.data_type.FLOAT
    )
    _place(out, o_offset)
    _place(dout, o_offset)
    _place(stats, _offset(graph, integers, g, "stats_offset"))
    most = {} if g.dense else {"max_total_seq_len_q": g.tokens, "max_total_seq_len_kv": g.tokens}
    dq, dk, dv = graph.sdpa_backward(
        name="sdpa_backward", q=q, k=k, v=v, o=out, dO=dout, stats=stats,
        use_deterministic_algorithm=g.deterministic, **most, **_mask(graph, cudnn, g),
    )  # fmt: skip
    dk_offset = _offset(graph, integers, g, "dk_offset")
    # dq is laid out as the output, dk and dv as contiguous [T, K, D], whatever views q, k and v are.
    for tensor, name, heads, row, offset in (
        (dq, "dq", g.heads, g.out_row, o_offset),
        (dk, "dk", g.kv_heads, g.kv_row, dk_offset),
        (dv, "dv", g.kv_heads, g.kv_row, dk_offset),
    ):
        tensor.set_uid(_UID[name]).set_output(True).set_dim(_dim(g, heads)).set_stride(_stride(g, row))
        _place(tensor, offset)
    return _finish(cudnn, graph)


def _new_graph(cudnn: Any, handle: Any, g: Geometry) -> tuple[Any, Any, Any]:
    kind = cudnn.data_type.BFLOAT16 if g.dtype == torch.bfloat16 else cudnn.data_type.HALF
    graph = cudnn.pygraph(
        io_data_type=kind,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )
    return graph, kind, cudnn.data_type.INT64


def _inputs(graph: Any, kind: Any, integers: Any, g: Geometry) -> list[Any]:
    found = []
    for name, heads, row in (("q", g.heads, g.q_row), ("k", g.kv_heads, g.k_row), ("v", g.kv_heads, g.v_row)):
        tensor = graph.tensor(uid=_UID[name], dim=_dim(g, heads), stride=_stride(g, row), data_type=kind)
        _place(tensor, _offset(graph, integers, g, f"{name}_offset"))
        found.append(tensor)
    return found


def _dim(g: Geometry, heads: int) -> tuple[int, int, int, int]:
    return g.documents, heads, g.longest, g.head_dim


def _stride(g: Geometry, row: int) -> tuple[int, int, int, int]:
    return g.longest * row, g.head_dim, row, 1


def _stats_dim(g: Geometry) -> tuple[int, int, int, int]:
    return g.documents, g.heads, g.longest, 1


def _stats_stride(g: Geometry) -> tuple[int, int, int, int]:
    return g.longest * g.heads, 1, g.heads, 1


def _offset(graph: Any, integers: Any, g: Geometry, name: str) -> Any:
    """None where all documents have one length: strides say where they begin."""
    if g.dense:
        return None
    return graph.tensor(
        uid=_UID[name], dim=(g.documents + 1, 1, 1, 1), stride=(1, 1, 1, 1), data_type=integers
    )


def _place(tensor: Any, offset: Any) -> None:
    if offset is not None:
        tensor.set_ragged_offset(offset)


def _lengths(graph: Any, cudnn: Any, g: Geometry) -> dict[str, Any]:
    """Each document's length, where they are not all one."""
    if g.dense:
        return {}
    lengths = graph.tensor(
        uid=_UID["lengths"], dim=(g.documents, 1, 1, 1), stride=(1, 1, 1, 1), data_type=cudnn.data_type.INT32
    )
    return {"use_padding_mask": True, "seq_len_q": lengths, "seq_len_kv": lengths}


def _mask(graph: Any, cudnn: Any, g: Geometry) -> dict[str, Any]:
    """Causal inside each document's length; a window counts the query itself, as ours does."""
    return {
        "attn_scale": float(g.scale),
        **_lengths(graph, cudnn, g),
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_right_bound": 0,
        **({} if g.window is None else {"diagonal_band_left_bound": int(g.window)}),
    }


def _finish(cudnn: Any, graph: Any) -> Any:
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph
