"""Attention's backward over groups of heads, for streams so long that its workspace would be the largest thing there.

Heads are independent: the gradients of a key/value head and its query heads need no others. FlashAttention-2 sums dq in
fp32 and expands dk and dv to all query heads, cuDNN keeps three such sums: 32 to 48 KB a token at 8B, as much as six
layer inputs, of which a group needs its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pronghorn.kernels.attention import AttentionCall, Documents, attention_backward

#: Tokens from which on one group more is made. A group of one key/value head keeps a GPU busy at this length.
GROUP_TOKENS = 16384
#: Which dimension of an implementation's statistics runs over heads; one that is not listed takes all heads at once.
_HEADS_OF_LSE = {"flash": 0, "cudnn": 1, "eager": 1}


def head_groups(tokens: int, kv_heads: int, backend: str) -> int:
    """In how many groups the heads go: a divisor of the number of key/value heads."""
    return groups_of(tokens, kv_heads) if backend in _HEADS_OF_LSE else 1


def groups_of(tokens: int, kv_heads: int) -> int:
    """The same for what can always be done by groups: so is the gated delta rule (`blocks.delta_net`)."""
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= max(tokens // GROUP_TOKENS, 1))


def groups_of_heads(tokens: int, heads: int, kv_heads: int, backend: str) -> Iterator[tuple[slice, slice]]:
    """The query heads and the key/value heads of each group."""
    groups = head_groups(tokens, kv_heads, backend)
    many, few = heads // groups, kv_heads // groups
    for group in range(groups):
        yield slice(group * many, (group + 1) * many), slice(group * few, (group + 1) * few)


def lse_of(lse: Tensor, heads: slice, backend: str) -> Tensor:
    """An implementation's statistics of some heads."""
    return lse.narrow(_HEADS_OF_LSE[backend], heads.start, heads.stop - heads.start)


def grouped_attention_backward(
    dout: Tensor | Callable[[slice], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    docs: Documents,
    call: AttentionCall,
    *,
    over: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention_backward`: gradients of q [T, N, D], k and v [T, K, D].

    Args:
        dout: [T, N, D]; or a function that makes it for some heads, [T, heads, D].
        over: where there are several groups, write them over dout (where that is made for some heads, over q), k and v,
            which have their shapes.
    """
    tokens, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    groups = head_groups(tokens, kv_heads, call.backend) if call.sinks is None else 1
    if groups == 1:
        whole = dout if isinstance(dout, Tensor) else dout(slice(0, heads))
        return attention_backward(whole, q, k, v, out, lse, docs, call)
    dq, dk, dv = (q, k, v) if over else (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    if over and isinstance(dout, Tensor):
        dq = dout
    for queries, keys in groups_of_heads(tokens, heads, kv_heads, call.backend):
        statistics = lse_of(lse, queries, call.backend)
        of_group = dout[:, queries] if isinstance(dout, Tensor) else dout(queries)
        parts = attention_backward(
            of_group, q[:, queries], k[:, keys], v[:, keys], out[:, queries], statistics, docs, call
        )
        del of_group
        dq[:, queries], dk[:, keys], dv[:, keys] = parts
        del parts
    return dq, dk, dv
