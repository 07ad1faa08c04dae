"""FlexAttention, compiled: softcap and bidirectional prefixes on a packed stream. Ampere and newer.

Which blocks of the [T, T] mask hold anything follows from each block's first and last document, so the block mask is
made on the device in (T / 128)² steps, without the host waiting and without a [T, T] mask.

FlexAttention's backward is reachable only through autograd, so it recomputes the forward pass. Statistics: [N, T].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from pronghorn.kernels.attention.documents import AttentionCall, Documents

BLOCK = 128
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention)


def forward(q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall) -> tuple[Tensor, Tensor]:
    # With grad enabled, so that backward finds the same compiled kernels.
    with torch.set_grad_enabled(q.is_cuda):
        inputs = [_heads_first(x, q.is_cuda) for x in (q, k, v)]
        out, lse = _attend(inputs, docs, call)
    return out.detach().squeeze(0).transpose(0, 1).contiguous(), lse.detach().squeeze(0).float()


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
    """Gradients; `lse` may hold sinks (L' of `sinks.py`): then out' = out · exp(L - L') is what is differentiated."""
    with torch.enable_grad():
        inputs = [_heads_first(x, True) for x in (q, k, v)]
        again, plain = _attend(inputs, docs, call)
        if call.sinks is not None:
            sinks = call.sinks.detach().to(plain.dtype)[:, None]
            again = (again * (plain - torch.logaddexp(plain, sinks)).exp().unsqueeze(-1)).to(again.dtype)
    grads = torch.autograd.grad(again, inputs, dout.transpose(0, 1).unsqueeze(0))
    dq, dk, dv = (grad.squeeze(0).transpose(0, 1).contiguous() for grad in grads)
    return dq, dk, dv


def _heads_first(x: Tensor, grad: bool) -> Tensor:
    return x.detach().transpose(0, 1).unsqueeze(0).requires_grad_(grad)


def _attend(inputs: list[Tensor], docs: Documents, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """out [1, N, T, D] and log-sums [1, N, T] of q, k and v, heads first."""
    q, k, v = inputs
    tokens = q.shape[2]
    mask = docs.derive(("flex", tokens, call.window), lambda: block_mask(docs, tokens, call.window))
    attend = _compiled() if q.is_cuda else flex_attention
    out, aux = attend(
        q,
        k,
        v,
        score_mod=None if call.softcap is None else _cap(call.softcap),
        block_mask=mask,
        scale=call.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse


@lru_cache(maxsize=16)
def _cap(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _mask(document: Tensor, seen_to: Tensor | None, window: int | None) -> MaskMod:
    """Which keys a query sees. `seen_to`: the end of its document's prefix, as a position in the stream."""

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if seen_to is not None:
            seen = seen | (key < seen_to[query])
        if window is not None:
            seen = seen & (query - key < window)
        return seen & (document[query] == document[key])

    return allowed


def block_mask(docs: Documents, tokens: int, window: int | None) -> BlockMask:
    """The mask of a stream in blocks of 128 x 128: none, in part (then `_mask` decides), or all of a block's pairs."""
    document = docs.document_of_token(tokens)
    seen_to = None
    if docs.prefix is not None:
        seen_to = (docs.cu_seqlens[:-1] + docs.prefix)[document]
    blocks = -(-tokens // BLOCK)
    begin = torch.arange(blocks, device=document.device) * BLOCK
    end = (begin + BLOCK - 1).clamp(max=tokens - 1)
    first, last = document[begin], document[end]
    row, column = (slice(None), None), (None, slice(None))
    # Documents follow each other, so two blocks share one when their ranges of documents overlap.
    some = (first[row] <= last[column]) & (first[column] <= last[row])
    one_document = (first == last)[row] & (first == last)[column] & (first[row] == first[column])
    before = begin[row] >= begin[column]
    below = begin[row] > begin[column]
    if seen_to is not None:
        # Prefix ends grow with the document, so the block's last query of a document sees at least as far as any.
        before = before | (begin[column] < seen_to[end][row])
        below = below | (end[column] < seen_to[begin][row])
    some, whole = some & before, one_document & below
    if window is not None:
        some = some & (begin[row] - end[column] < window)
        whole = whole & (end[row] - begin[column] < window)
    # A last block that is cut short is checked pair by pair.
    whole = whole & some & ((end - begin) == BLOCK - 1)[row] & ((end - begin) == BLOCK - 1)[column]
    part_count, part = _ordered(some & ~whole)
    whole_count, whole_indices = _ordered(whole)
    return BlockMask.from_kv_blocks(
        part_count,
        part,
        whole_count,
        whole_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask(document, seen_to, window),
        seq_lengths=(tokens, tokens),
    )


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """[blocks, blocks] -> how many are set in each row and their columns first, as [1, 1, ...] int32."""
    order = torch.argsort(dense.to(torch.int8), dim=1, descending=True, stable=True)
    return dense.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]
