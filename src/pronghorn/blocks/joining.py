"""Which groups are multiplied as one weight where their weights lie side by side (`weights.stack`), by direction.

Llama-3.1-8B, 8,192 tokens, H200, a layer, joined against apart: q, k, v forward 540 against 528 µs, so they stay apart
and attention gets its q, k and v contiguous, which its backward wants; their input gradient 541 against 593, gate and
up forward 2,600 against 2,711 and input gradient 2,582 against 2,606.
"""

from __future__ import annotations

GATE_UP_FORWARD = True
#: needs gate and up side by side, as `GATE_UP_FORWARD` leaves them
GATE_UP_INPUT_GRAD = True
QKV_INPUT_GRAD = True

#: Where weights are multiplied in fp8: the activation, and its backward, find the rows' largest numbers, so that the
#: codes are made in tiles instead of whole rows. At 8B the codes of gate's and up's gradients then take 173 instead of
#: 205 µs, but the activation's backward 412 instead of 342; the activation's codes 96 instead of 99.
ROW_MAX_FORWARD = False
ROW_MAX_BACKWARD = False
