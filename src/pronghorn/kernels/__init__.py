"""Kernels: one public function per operation, with a torch reference that is also the CPU path.

`impl` chooses by hand: "torch" or "triton"; None takes Triton for CUDA tensors and torch elsewhere. The Triton files
in `kernels/triton` are imported when first needed, so that a machine without Triton never notices them.

`fast_linear_forward(proj, X, temp_lora=None, out=None)` is found here by scripts that look for it here. It takes whole
modules, so it lives two layers up (`pronghorn.engine.linear`) and is imported when it is asked for; nothing in this
package uses it.
"""

from pronghorn.importing import names_at_first_use

__getattr__ = names_at_first_use(__name__, {"fast_linear_forward": "pronghorn.engine.linear"})
