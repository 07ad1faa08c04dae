"""Triton kernels. Imported by the functions in `kernels` when a CUDA tensor comes, never by anything else.

Loads are converted to fp32 and stores are rounded once. Offsets are 64-bit where a tensor can pass 2³¹ elements.
"""
