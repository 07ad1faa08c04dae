"""Kernels: one public function per operation, with a torch reference that is also the CPU path.

`impl` chooses by hand: "torch" or "triton"; None takes Triton for CUDA tensors and torch elsewhere. The Triton files
in `kernels/triton` are imported when first needed, so that a machine without Triton never notices them.
"""
