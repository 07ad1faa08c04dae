"""Causal attention over a packed token stream, one interface over several implementations.

    out[t, n] = Σ_j softmax_j(scale · q[t, n]·k[j, n//G]) v[j, n//G],   j in t's document, j ≤ t, t - j < window

with three optional changes: logits capped (`softcap`), a learned logit per head in the denominator (`sinks`), and
tokens that see what follows them, to the end of an image, say (`Documents.seen_to`: j < seen_to[t] in place of j ≤ t).

Shapes: q [T, N, D], k and v [T, K, D] with G = N / K, out [T, N, D], where v and out may have fewer columns; the
statistics `lse` are fp32. Forward and backward are explicit calls: the attention block decides what is kept between
them.
"""

from pronghorn.kernels.attention.choose import BACKENDS, check_name, choose_backend
from pronghorn.kernels.attention.cudnn_ragged import INSTALL_CUDNN
from pronghorn.kernels.attention.dispatch import attention_backward, attention_forward, attention_sink_grad
from pronghorn.kernels.attention.documents import AttentionCall, Documents

__all__ = [
    "BACKENDS",
    "INSTALL_CUDNN",
    "AttentionCall",
    "Documents",
    "attention_backward",
    "attention_forward",
    "attention_sink_grad",
    "check_name",
    "choose_backend",
]
