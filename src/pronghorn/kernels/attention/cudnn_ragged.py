"""cuDNN's attention over ragged token streams, through the optional package nvidia-cudnn-frontend. Hopper and newer.

Statistics: [T, N] fp32, natural logarithms like FlashAttention's, so that where cuDNN has no plan for a geometry
FlashAttention-2 takes the same call's place (the reason is logged once).

Where all documents have one length, plans are made for that alone (`Geometry.dense`). Whether they do follows from
three numbers that a captured step is recorded for: documents, longest and tokens.

Backward adds dq in whatever order its blocks finish, unless `torch.use_deterministic_algorithms(True)` is on, as with
FlashAttention-2. Its workspace in bytes, besides 4 · tokens · N of row sums:
    12 · tokens · N · D,  4 · tokens · N · D where N = K,
    and in deterministic order 2 · documents · N · longest² in place of 4 · tokens · N · D,
all numbers as `bucket` rounds them. A dense one has 8 · tokens · N · D in place of 12.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

import torch
from torch import Tensor

from pronghorn.kernels.attention import flash, per_document
from pronghorn.kernels.attention.cudnn_plans import (
    PLANS,
    Geometry,
    bucket,
    build_backward,
    build_forward,
    frontend,
    longest_bucket,
)
from pronghorn.kernels.attention.documents import AttentionCall, Documents

logger = logging.getLogger("pronghorn")

#: The reason where only a package is missing.
INSTALL_CUDNN = (
    "install nvidia-cudnn-frontend for faster attention on this GPU: pip install 'pronghorn[hopper]'"
)
#: Bytes of token pairs that a deterministic backward may keep; beyond, FlashAttention-2's is taken.
MOST_PAIR_BYTES = 2**30
#: Versions of the frontend and of cuDNN that were measured and compared with the reference; others are probed.
KNOWN_FRONTENDS = ((1, 18), (1, 24))
KNOWN_CUDNN = (91900, 92000)


def forward(q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall) -> tuple[Tensor, Tensor]:
    q, k, v = (_token_rows(x) for x in (q, k, v))
    geometry = _geometry(q, k, v, docs, call)
    plan = PLANS.get("forward", geometry, build_forward)
    if plan is None:
        out, lse = flash.forward(q, k, v, docs, call)
        return out, lse.t().contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    tensors = {"q": q, "k": k, "v": v, "o": out, "stats": stats, **_layout(geometry, docs)}
    PLANS.run(plan, tensors, q.device)
    return out, stats


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    docs: Documents,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    # dq and dk come out wrong where q, k and v are columns of one buffer (cuDNN 9.19); our blocks keep them apart.
    q, k, v = (_token_rows(x.contiguous()) for x in (q, k, v))
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    geometry = _geometry(q, k, v, docs, call, for_backward=True)
    dear = geometry.deterministic and _pair_bytes(geometry) > MOST_PAIR_BYTES
    if dear:
        _tell_dear()
    plan = None if dear else PLANS.get("backward", geometry, build_backward)
    if plan is None:
        return flash.backward(dout, q, k, v, out, lse.t().contiguous(), docs, call)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    tensors = {
        "q": q, "k": k, "v": v, "o": out, "do": dout, "stats": lse, "dq": dq, "dk": dk, "dv": dv,
        **_layout(geometry, docs),
    }  # fmt: skip
    if not geometry.dense:
        tensors["dk_offset"] = docs.element_offsets(geometry.documents, geometry.kv_row)
    PLANS.run(plan, tensors, q.device)
    return dq, dk, dv


def _pair_bytes(g: Geometry) -> int:
    """What a deterministic backward keeps: dP in 16 bits, every document as long as the longest."""
    return 2 * g.documents * g.heads * (-(-g.longest // 64) * 64) ** 2


@lru_cache(maxsize=1)
def _tell_dear() -> None:
    logger.warning(
        "pronghorn: FlashAttention-2 runs backward for batches whose deterministic order would cost cuDNN more "
        "than %d MiB",
        MOST_PAIR_BYTES >> 20,
    )


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, *, windowed: bool) -> str | None:
    """Why cuDNN's ragged attention does not run on a CUDA device; None when it does.

    A version, GPU or head size outside those measured is tried on one small stream, forward and backward.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return f"cuDNN's packed attention takes fp16 and bf16, not {dtype}"
    if head_dim > 256 or head_dim % 16:
        # In steps of 8 cuDNN works too, but with a workspace for every document at the longest one's length.
        return f"cuDNN's packed attention takes head sizes up to 256 in steps of 16, not {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return (
            f"cuDNN's packed attention needs compute capability 9.0, this is {capability[0]}.{capability[1]}"
        )
    missing = _why_no_frontend()
    if missing is not None:
        return missing
    if head_dim <= 128 and capability[0] == 9 and _known_versions():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _probe(torch.device("cuda", index), dtype, head_dim, windowed)


@lru_cache(maxsize=1)
def _why_no_frontend() -> str | None:
    try:
        cudnn = frontend()
        cudnn.backend_version()
    except ImportError:
        return INSTALL_CUDNN
    # OSError, AssertionError: no libcudnn, or several; RuntimeError: one that the frontend cannot call.
    except (OSError, AssertionError, RuntimeError) as error:
        return f"nvidia-cudnn-frontend is installed but finds no cuDNN: {error}"
    return None


def _known_versions() -> bool:
    found = re.match(r"(\d+)\.(\d+)", frontend().__version__)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    low, high = KNOWN_CUDNN
    return KNOWN_FRONTENDS[0] <= version < KNOWN_FRONTENDS[1] and low <= frontend().backend_version() < high


@lru_cache(maxsize=64)
def _probe(device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool) -> str | None:
    """Why small streams do not go through, or do not give the written-out formula's numbers; None if they do."""
    for lengths in ((100, 0, 156), (128, 128)):
        reason = _probe_stream(lengths, device, dtype, head_dim, windowed)
        if reason is not None:
            return reason
    return None


def _probe_stream(
    lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool
) -> str | None:
    generator = torch.Generator(device).manual_seed(0)
    tokens = sum(lengths)
    cu = torch.tensor((0, *lengths), device=device).cumsum(0).to(torch.int32)
    docs = Documents(cu, max(lengths), lengths)

    def stream(heads: int) -> Tensor:
        return torch.randn(tokens, heads, head_dim, generator=generator, device=device).to(dtype)

    q, dout, k, v = stream(2), stream(2), stream(1), stream(1)
    call = AttentionCall(head_dim**-0.5, 48 if windowed else None, "cudnn")
    versions = f"nvidia-cudnn-frontend {frontend().__version__} with cuDNN {frontend().backend_version()}"
    geometries = [_geometry(q, k, v, docs, call), _geometry(q, k, v, docs, call, for_backward=True)]
    plans = [
        PLANS.get(stage, geometry, build)
        for stage, geometry, build in zip(
            ("forward", "backward"), geometries, (build_forward, build_backward), strict=True
        )
    ]
    if None in plans:
        return f"{versions} has no plan for head size {head_dim} on this GPU"
    out, lse = forward(q, k, v, docs, call)
    actual = (out, *backward(dout, q, k, v, out, lse, docs, call))
    q, k, v, dout = (x.float() for x in (q, k, v, dout))
    truth, statistics = per_document.eager_forward(q, k, v, docs, call)
    expected = (truth, *per_document.eager_backward(dout, q, k, v, truth, statistics, docs, call))
    for name, ours, exact in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        # Rounding inputs, weights and results to 8 bits leaves about half a per cent; a wrong formula tens of them.
        if not (ours.float() - exact).norm() <= 0.02 * exact.norm():
            return f"{versions} gives a wrong {name} for head size {head_dim} on this GPU"
    return None


def _token_rows(x: Tensor) -> Tensor:
    """[T, heads, D] whose heads lie side by side, each row 16-byte aligned; a copy where they do not."""
    heads, size = x.shape[1:]
    adjacent = x.stride(2) == 1 and (heads == 1 or x.stride(1) == size)
    return x if adjacent and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.contiguous()


def _geometry(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall, for_backward: bool = False
) -> Geometry:
    tokens, heads, size = q.shape
    longest, rows = min(docs.max_seqlen, tokens), (q.stride(0), k.stride(0), v.stride(0), heads * size)
    dense = _is_dense(docs.count, longest, tokens, max(rows))
    count, rounded, most = bucket(docs.count, longest, tokens)
    return Geometry(
        device=q.device,
        dtype=q.dtype,
        documents=docs.count if dense else count,
        longest=rounded,
        tokens=most if for_backward and not dense else 0,
        heads=heads,
        kv_heads=k.shape[1],
        head_dim=size,
        q_row=rows[0],
        k_row=rows[1],
        v_row=rows[2],
        scale=call.scale,
        window=call.window if call.window is not None and call.window < docs.max_seqlen else None,
        deterministic=for_backward
        and torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled(),
        dense=dense,
    )


def _is_dense(documents: int, longest: int, tokens: int, row: int) -> bool:
    """Whether all documents have one length, a plan for which serves many batches.

    None is longer than the longest, so they are all as long where they have so many tokens together. Lengths that would
    be rounded up stay ragged: each would want a plan of its own.
    """
    return documents * longest == tokens and longest == longest_bucket(longest) and tokens * row < 2**31


def _layout(geometry: Geometry, docs: Documents) -> dict[str, Tensor]:
    """Lengths and offsets of the documents, made once per pass; nothing where they follow from the geometry."""
    if geometry.dense:
        return {}
    count = geometry.documents
    rows = {
        "q_offset": geometry.q_row,
        "k_offset": geometry.k_row,
        "v_offset": geometry.v_row,
        "o_offset": geometry.out_row,
        "stats_offset": geometry.heads,
    }
    offsets = {name: docs.element_offsets(count, row) for name, row in rows.items()}
    return {"lengths": docs.padded(count)[1].view(-1, 1, 1, 1), **offsets}
