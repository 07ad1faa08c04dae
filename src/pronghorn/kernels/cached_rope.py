"""The rotation of a prompt's q and k, and its keys and values into the cache, in one launch.

    q, k = rotate(norm(q)), rotate(norm(k));   cache[place] = k, v

Shapes: T tokens, N heads, K key/value heads, D head size; qkv [T, (N + 2K)·D] as the projections give it; cos, sin
[T, Drot] with Drot ≤ D; cache [blocks, tokens a block, 2, K, D], keys before values; places int64 [T], rows of all
blocks' tokens.
"""

from __future__ import annotations

from torch import Tensor

from pronghorn.kernels.decode_attention import Heads
from pronghorn.kernels.dispatch import Impl, use_triton
from pronghorn.kernels.rope import qk_rope_forward


def rope_into_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    places: Tensor,
    heads: Heads,
    *,
    pairs: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, N, D], k and v [T, K, D] as the attention takes them; they may be views of qkv, which is written over.

    Args:
        pairs: neighbouring elements are turned, not halves.
    """
    by_head = qkv.view(qkv.shape[0], heads.heads + 2 * heads.kv_heads, heads.head_dim)
    q, k, v = by_head.split((heads.heads, heads.kv_heads, heads.kv_heads), 1)
    if use_triton(qkv, impl):
        from pronghorn.kernels.triton.cached_rope import rope_into_cache_

        rope_into_cache_(q, k, v, cos, sin, cache, places, heads, pairs)
        return q, k, v
    q, k = qk_rope_forward(
        q,
        k,
        cos,
        sin,
        q_norm_weight=heads.q_norm,
        k_norm_weight=heads.k_norm,
        eps=heads.eps,
        weight_offset=heads.norm_offset,
        pairs=pairs,
        impl=impl,
    )
    flat = cache.flatten(0, 1)
    flat[:, 0].index_copy_(0, places, k)
    flat[:, 1].index_copy_(0, places, v)
    return q, k, v
