"""FlashAttention-2 over `cu_seqlens`, as torch carries it. Ampere and newer, fp16 and bf16.

Statistics: [N, T] fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.attention.documents import AttentionCall, Documents

aten = torch.ops.aten


def _window(call: AttentionCall) -> dict[str, int]:
    # FlashAttention counts the keys left of the query, without the query itself.
    return {} if call.window is None else {"window_size_left": call.window - 1, "window_size_right": 0}


def forward(q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall) -> tuple[Tensor, Tensor]:
    cu, longest = docs.cu_seqlens, docs.max_seqlen
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=call.scale, **_window(call)
    )
    return out, lse


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
    cu, longest = docs.cu_seqlens, docs.max_seqlen
    # The random state is read only for dropout > 0, which no supported family trains with.
    no_rng = torch.empty(2, dtype=torch.uint64, device=q.device)
    grads = aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu, cu, longest, longest, 0.0, True, no_rng, no_rng[:0],
        scale=call.scale, **_window(call),
    )  # fmt: skip
    return grads[0], grads[1], grads[2]
