"""FlexAttention, compiled: softcap and tokens that see what follows them, on a packed stream. Ampere and newer.

Which blocks of the [T, T] mask hold anything follows from each block's first and last document, so the block mask is
made on the device in (T / 128)² steps, without the host waiting and without a [T, T] mask.

FlexAttention's backward is reachable only through autograd, so it recomputes the forward pass. Statistics: [N, T].
Where torch cannot compile a case, the written-out formula takes its place and the reason is logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from pronghorn.kernels.attention import per_document
from pronghorn.kernels.attention.documents import AttentionCall, Documents

logger = logging.getLogger("pronghorn")

BLOCK = 128
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
#: (q, k, v, document, seen_to, *block lists) -> (out, log-sums), heads first
Attend = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kind:
    """What a compiled function is made for: everything but the number of tokens, which it leaves open."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    both_ways: bool


class Programs:
    """The compiled functions of this process, one a kind, and why kinds have none."""

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.backend = backend
        self.made: dict[Kind, Attend] = {}
        self.refused: dict[Kind, str] = {}

    def get(self, kind: Kind) -> Attend:
        if kind not in self.made:
            self.made[kind] = _compile(kind, len(self.made), self.backend)
        return self.made[kind]

    def refuse(self, kind: Kind, error: Exception) -> None:
        """Remember that a kind cannot run; a reason is told once, whatever the number of kinds it holds for."""
        text = str(error).strip()
        reason = f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
        if reason not in self.refused.values():
            logger.warning(
                "pronghorn: attention runs written out, document by document, in place of FlexAttention: %s",
                reason,
            )
        self.refused[kind] = reason


PROGRAMS = Programs()


def forward(q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall) -> tuple[Tensor, Tensor]:
    kind = _kind(q, k, docs, call)
    if kind not in PROGRAMS.refused:
        try:
            return _forward(kind, q, k, v, docs)
        # Compilers raise classes of their own.
        except Exception as error:
            _accept(kind, error)
    out, lse = per_document.eager_forward(q, k, v, docs, call)
    return out, lse.t().contiguous()


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
    kind = _kind(q, k, docs, call)
    if kind not in PROGRAMS.refused:
        try:
            return _backward(kind, dout, q, k, v, docs, call.sinks)
        except Exception as error:
            _accept(kind, error)
    return per_document.eager_backward(dout, q, k, v, out, lse.t(), docs, call)


def _accept(kind: Kind, error: Exception) -> None:
    """Refuse a kind from now on; but memory that ran out says nothing about it, nor does what a capture forbids."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise error
    PROGRAMS.refuse(kind, error)


def _kind(q: Tensor, k: Tensor, docs: Documents, call: AttentionCall) -> Kind:
    return Kind(
        device=q.device,
        dtype=q.dtype,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        both_ways=docs.seen_to is not None,
    )


def _forward(kind: Kind, q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> tuple[Tensor, Tensor]:
    # With grad enabled, so that backward finds the same compiled kernels.
    with torch.set_grad_enabled(q.is_cuda):
        out, lse = _attend(kind, [_heads_first(x, q.is_cuda) for x in (q, k, v)], docs)
    return out.detach().squeeze(0).transpose(0, 1).contiguous(), lse.detach().squeeze(0).float()


def _backward(
    kind: Kind, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, docs: Documents, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        inputs = [_heads_first(x, True) for x in (q, k, v)]
        again, plain = _attend(kind, inputs, docs)
        if sinks is not None:
            column = sinks.detach().to(plain.dtype)[:, None]
            again = (again * (plain - torch.logaddexp(plain, column)).exp().unsqueeze(-1)).to(again.dtype)
    grads = torch.autograd.grad(again, inputs, dout.transpose(0, 1).unsqueeze(0))
    dq, dk, dv = (grad.squeeze(0).transpose(0, 1).contiguous() for grad in grads)
    return dq, dk, dv


def _heads_first(x: Tensor, grad: bool) -> Tensor:
    return x.detach().transpose(0, 1).unsqueeze(0).requires_grad_(grad)


def _attend(kind: Kind, inputs: list[Tensor], docs: Documents) -> tuple[Tensor, Tensor]:
    """out [1, N, T, D] and log-sums [1, N, T] of q, k and v, heads first."""
    arguments = _arguments(kind, inputs, docs)
    attend = PROGRAMS.get(kind) if kind.device.type == "cuda" else _formula(kind)
    return attend(*arguments)


def _arguments(kind: Kind, inputs: list[Tensor], docs: Documents) -> list[Tensor | None]:
    """What an `Attend` takes, every size that follows from the number of tokens marked as open."""
    tokens = inputs[0].shape[2]
    mask = docs.derive(("flex", tokens, kind.window), lambda: block_mask(docs, tokens, kind.window))
    lists = [
        mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices,
        mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices,
    ]  # fmt: skip
    per_token = [docs.document_of_token(tokens), docs.seen_to]
    for x in (*inputs, *lists):
        torch._dynamo.maybe_mark_dynamic(x, 2)
    for x in lists[1::2]:
        torch._dynamo.maybe_mark_dynamic(x, 3)
    for x in per_token:
        if x is not None:
            torch._dynamo.maybe_mark_dynamic(x, 0)
    return [*inputs, *per_token, *lists]


def _formula(kind: Kind) -> Attend:
    """FlexAttention of a kind as one function of tensors, the mask's own tensors among them.

    Nothing but tensors changes between calls: numbers that change would be taken for variables when torch compiles
    anew, and FlexAttention compiles no variable softcap.
    """

    def attend(
        q: Tensor, k: Tensor, v: Tensor, document: Tensor, seen_to: Tensor | None, *lists: Tensor
    ) -> tuple[Tensor, Tensor]:
        mask = BlockMask(
            (q.shape[2], k.shape[2]),
            *lists,
            BLOCK_SIZE=(BLOCK, BLOCK),
            mask_mod=_mask(document, seen_to, kind_window),
        )
        out, aux = flex_attention(
            q, k, v, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=grouped,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return out, aux.lse

    kind_window, scale, grouped = kind.window, kind.scale, kind.heads != kind.kv_heads
    cap = None if kind.softcap is None else _cap(kind.softcap)
    return attend


def _compile(kind: Kind, number: int, backend: str | Callable[..., Any]) -> Any:
    """`_formula` compiled on its own.

    torch keeps compiled code, its limit of versions and which numbers it has seen change per code object and name,
    so kinds that shared one would make each other's constants variables.
    """
    plain: Any = _formula(kind)
    code = plain.__code__.replace(co_name=f"attend_{number}")
    own = FunctionType(code, plain.__globals__, code.co_name, None, plain.__closure__)
    # A part that could not be compiled would run without its kernels, on a [T, T] matrix: rather an error.
    return torch.compile(own, fullgraph=True, backend=backend)


def _cap(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _mask(document: Tensor, seen_to: Tensor | None, window: int | None) -> MaskMod:
    """Which keys a query sees."""

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key if seen_to is None else key < seen_to[query]
        if window is not None:
            seen = seen & (query - key < window)
        return seen & (document[query] == document[key])

    return allowed


def block_mask(docs: Documents, tokens: int, window: int | None) -> BlockMask:
    """The mask of a stream in blocks of 128 x 128: none, in part (then `_mask` decides), or all of a block's pairs."""
    document = docs.document_of_token(tokens)
    seen_to = docs.seen_to
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
        # No token sees less far than the one before it: the block's last query the farthest, its first the least.
        before = begin[column] < seen_to[end][row]
        below = end[column] < seen_to[begin][row]
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
