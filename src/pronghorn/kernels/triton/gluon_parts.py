"""What kernels written in Gluon share, and names that releases of Triton have changed."""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

_gl: Any = gl
_tma: Any = tma
_shared: Any = gl.shared_memory_descriptor
#: memory of a program seen as other numbers
view = getattr(_shared, "_reinterpret", None) or _shared.reinterpret
#: the copy engine brings a tile into shared memory, or takes it from there
fetch = getattr(_tma, "async_load", None) or _tma.async_copy_global_to_shared
put_back = getattr(_tma, "async_store", None) or _tma.async_copy_shared_to_global
#: all threads that run this code wait for each other
barrier = getattr(_gl, "thread_barrier", None) or _gl.barrier


@gluon.jit
def launch_next():
    """As in `launch`."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_last():
    """As in `launch`."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def activated(gate, up, KIND: gl.constexpr):
    """f(gate) · up in fp32; tanh(u) is 2 σ(2u) - 1."""
    if KIND == "silu":
        return gate / (1.0 + gl.exp(-gate)) * up
    elif KIND == "gelu":
        return 0.5 * gate * (1.0 + gl.erf(gate * 0.7071067811865476)) * up
    else:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + gl.exp(-inner)) * up
