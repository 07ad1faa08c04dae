"""Which groups are multiplied as one weight where their weights lie side by side (`weights.stack`), by direction.

Llama-3.1-8B, 8,192 tokens, H200, a layer, joined against apart: q, k, v forward 540 against 528 µs, input gradient 541
against 593; gate and up forward 2,600 against 2,711, input gradient 2,582 against 2,606. Where k and v alone are too
little work for the GPU (1.5B, 2,048 tokens: 32 tiles) their forward product gains too, 10 µs. The rotation then writes
q, k and v apart: attention's backward wants them contiguous.
"""

from __future__ import annotations

GATE_UP_FORWARD = True
#: needs gate and up side by side, as `GATE_UP_FORWARD` leaves them
GATE_UP_INPUT_GRAD = True
QKV_INPUT_GRAD = True
#: tiles of 128 x 128 below which k's product is joined with the others in forward
QKV_FORWARD_TILES = 132


def joins_qkv_forward(tokens: int, kv_width: int) -> bool:
    """Whether q, k and v [tokens, ...] are made by one product, k and v being `kv_width` wide."""
    return -(-tokens // 128) * -(-kv_width // 128) < QKV_FORWARD_TILES


#: Where weights are multiplied in fp8: the activation, and its backward, find the rows' largest numbers, so that the
#: codes are made in tiles instead of whole rows. At 8B the codes of gate's and up's gradients then take 173 instead of
#: 205 µs, but the activation's backward 412 instead of 342; the activation's codes 96 instead of 99.
ROW_MAX_FORWARD = False
ROW_MAX_BACKWARD = False

#: Whether the products around a gated unit make it and differentiate it themselves, where they can.
GATED_IN_PRODUCTS = True

#: Whether products of weights in 16 bits add adapters and a residual themselves, where they can. Llama-3.1-8B, 8,192
#: tokens, H200, in turns: o 455 -> 412 µs, down 1,443 -> 1,377; input gradients with the gradients of B: of q, k, v
#: 710 -> 656, of o 469 -> 442.
ADAPTERS_IN_PRODUCTS = True
