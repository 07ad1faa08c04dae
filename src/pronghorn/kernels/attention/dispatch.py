"""The three calls that every implementation answers."""

from __future__ import annotations

from torch import Tensor

from pronghorn.kernels.attention import flash, per_document
from pronghorn.kernels.attention.documents import AttentionCall, Documents
from pronghorn.kernels.attention.sinks import add_sinks, sink_grad

_FORWARDS = {
    "flash": flash.forward,
    "cpu": per_document.cpu_forward,
    "sdpa": per_document.sdpa_forward,
    "eager": per_document.eager_forward,
}
_BACKWARDS = {
    "flash": flash.backward,
    "cpu": per_document.cpu_backward,
    "sdpa": per_document.sdpa_backward,
    "eager": per_document.eager_backward,
}


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """out [T, N, D] and the statistics that `attention_backward` wants; their layout is the implementation's own."""
    out, lse = _FORWARDS[call.backend](q, k, v, docs, call)
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
    """Gradients of q, k and v for dout [T, N, D]; `out` and `lse` as `attention_forward` returned them."""
    return _BACKWARDS[call.backend](dout, q, k, v, out, lse, docs, call)


def attention_sink_grad(dout: Tensor, out: Tensor, lse: Tensor, call: AttentionCall) -> Tensor:
    """The gradient of `call.sinks` [N], fp32 (fp64 for fp64 inputs), from the same tensors as `attention_backward`."""
    assert call.sinks is not None
    return sink_grad(dout, out, _by_token(lse, call), call.sinks)


def _by_token(lse: Tensor, call: AttentionCall) -> Tensor:
    """Statistics as a [T, N] view."""
    return lse.t() if call.backend == "flash" else lse
