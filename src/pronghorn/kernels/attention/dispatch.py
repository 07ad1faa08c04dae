"""The three calls that every implementation answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from torch import Tensor
from torch.nn import functional as F

from pronghorn.kernels.attention import flash, per_document
from pronghorn.kernels.attention.documents import AttentionCall, Documents
from pronghorn.kernels.attention.sinks import add_sinks, sink_grad

Forward = Callable[[Tensor, Tensor, Tensor, Documents, AttentionCall], tuple[Tensor, Tensor]]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Documents, AttentionCall], tuple[Tensor, Tensor, Tensor]
]


@lru_cache(maxsize=16)
def _implementation(backend: str) -> tuple[Forward, Backward]:
    if backend == "cudnn":
        from pronghorn.kernels.attention import cudnn_ragged

        return cudnn_ragged.forward, cudnn_ragged.backward
    if backend == "flex":
        from pronghorn.kernels.attention import flex

        return flex.forward, flex.backward
    return {
        "flash": (flash.forward, flash.backward),
        "cpu": (per_document.cpu_forward, per_document.cpu_backward),
        "sdpa": (per_document.sdpa_forward, per_document.sdpa_backward),
        "eager": (per_document.eager_forward, per_document.eager_backward),
    }[backend]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """out [T, N, F] and the statistics that `attention_backward` wants; their layout is the implementation's own.

    v [T, K, F] may be narrower than q and k, F ≤ D: implementations take heads of one size, and get columns of zeros.
    """
    width = v.shape[2]
    out, lse = _implementation(call.backend)[0](q, k, _widened(v, q), docs, call)
    out = out if width == q.shape[2] else out[..., :width].contiguous()
    if call.sinks is not None:
        add_sinks(out, _by_token(lse, call), call.sinks)
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    docs: Documents,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for dout [T, N, F]; `out` and `lse` as `attention_forward` returned them. That of a v
    narrower than q is a view."""
    width, (dout, v, out) = v.shape[2], (_widened(x, q) for x in (dout, v, out))
    dq, dk, dv = _implementation(call.backend)[1](dout, q, k, v, out, lse, docs, call)
    return dq, dk, dv[..., :width]


def _widened(x: Tensor, q: Tensor) -> Tensor:
    """x [T, K, F] with as many columns as q [T, N, D]."""
    return x if x.shape[2] == q.shape[2] else F.pad(x, (0, q.shape[2] - x.shape[2]))


def attention_sink_grad(dout: Tensor, out: Tensor, lse: Tensor, call: AttentionCall) -> Tensor:
    """The gradient of `call.sinks` [N], fp32 (fp64 for fp64 inputs), from the same tensors as `attention_backward`."""
    assert call.sinks is not None
    return sink_grad(dout, out, _by_token(lse, call), call.sinks)


def _by_token(lse: Tensor, call: AttentionCall) -> Tensor:
    """Statistics as a [T, N] view."""
    return lse.t() if call.backend in ("flash", "flex") else lse
