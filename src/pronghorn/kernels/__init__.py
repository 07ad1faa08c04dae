"""Kernels: one public function per operation, with a torch reference that is also the CPU path.

`impl` chooses by hand: "torch" or "triton"; None takes Triton for CUDA tensors and torch elsewhere. The Triton files
in `kernels/triton` are imported when first needed, so that a machine without Triton never notices them.

`fast_linear_forward(proj, X, temp_lora=None, out=None)` is found here by scripts that look for it here. It takes whole
modules, so it lives two layers up (`pronghorn.engine.linear`) and is imported when it is asked for; nothing in this
package uses it.
"""

from importlib import import_module
from typing import Any

_ELSEWHERE = {"fast_linear_forward": "pronghorn.engine.linear"}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'pronghorn.kernels' has no attribute '{name}'")
    return getattr(import_module(_ELSEWHERE[name]), name)
