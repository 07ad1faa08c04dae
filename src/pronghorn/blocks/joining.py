"""Which groups are multiplied as one weight where their weights lie side by side (`weights.stack`), by direction.

Llama-3.1-8B, 8,192 tokens, H200, a layer, joined against apart: q, k, v forward 633 against 628 µs, so they stay apart
and attention gets its q, k and v contiguous, which its backward wants; their input gradient 614 against 648 µs, gate
and up forward 2,894 against 2,928 and input gradient 2,830 against 2,836, and a pass over [T, H] fewer to add to.
"""

from __future__ import annotations

GATE_UP_FORWARD = True
#: needs gate and up side by side, as `GATE_UP_FORWARD` leaves them
GATE_UP_INPUT_GRAD = True
QKV_INPUT_GRAD = True

#: Where weights are multiplied in fp8: the activation, and its backward, find the rows' largest numbers, so that the
#: codes are made in tiles instead of whole rows.
ROW_MAX_FORWARD = False
ROW_MAX_BACKWARD = True
