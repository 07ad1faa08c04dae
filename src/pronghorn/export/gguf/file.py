"""Write a GGUF file tensor by tensor: memory holds one, whatever the model's size."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pronghorn.errors import SaveFailed
from pronghorn.export.gguf.methods import Method
from pronghorn.export.safetensors_file import Entry

#: Names of what chooses among experts, which decides too much to be rounded, and of a few numbers a channel.
_WIDE = ("ffn_gate_inp", "ssm_conv1d")
#: Weights that are quantised at a time; numpy's quantisers make several copies of what they are given.
_AT_A_TIME = 1 << 24


def write_gguf(
    path: Path,
    architecture: str,
    add_metadata: Callable[[Any], None],
    entries: Sequence[Entry],
    method: Method,
) -> None:
    """Write the entries in a format of `NATIVE`.

    Vectors, routers and short convolutions stay in fp32. A matrix whose rows are no whole blocks of 32 becomes F16.
    Below 8 bits, what predicts the next token (the head, or the embedding where it is both) becomes Q8_0.

    Raises:
        SaveFailed: for a weight beyond the range of float16 in an F16 file.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(None, architecture)
    add_metadata(writer)
    kinds = {entry.name: _kind(entry, method, entries) for entry in entries}
    for entry in entries:
        kind = kinds[entry.name]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), _nbytes(entry, kind), kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(encode(entry.make(), kinds[entry.name], entry.name))
        end = writer.fout[0].tell()
    finally:
        writer.close()
    if path.stat().st_size < end:  # numpy does not see that its last bytes were not written
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _kind(entry: Entry, method: Method, entries: Sequence[Entry]) -> Any:
    from gguf import GGMLQuantizationType as Kind

    if len(entry.shape) < 2 or any(name in entry.name for name in _WIDE):
        return Kind.F32
    kind = Kind[method.name.upper()]
    names = {other.name for other in entries}
    head = "output.weight" if "output.weight" in names else "token_embd.weight"
    if method.bits < 8 and entry.name == head:
        kind = Kind.Q8_0
    return Kind.F16 if method.bits <= 8 and entry.shape[-1] % 32 else kind


def _nbytes(entry: Entry, kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return prod(entry.shape) // block * size


def encode(tensor: Tensor, kind: Any, name: str) -> np.ndarray:
    """A tensor's bytes in one of GGUF's formats, as an array.

    Raises:
        SaveFailed: for a weight beyond the range of float16.
    """
    from gguf import GGMLQuantizationType as Kind
    from gguf import quants

    tensor = tensor.detach().to("cpu", torch.float32).contiguous()
    if kind == Kind.F32:
        return tensor.numpy()
    if kind == Kind.BF16:
        return tensor.to(torch.bfloat16).view(torch.int16).numpy()
    if kind == Kind.F16:
        rounded = tensor.to(torch.float16)
        if bool((rounded.isinf() & tensor.isfinite()).any()):
            raise SaveFailed(f"{name} has values beyond the range of float16", fix="use 'bf16' or 'f32'")
        return rounded.numpy()
    rows = max(1, _AT_A_TIME // tensor.shape[-1])
    parts = tensor.flatten(0, -2).split(rows)
    return np.concatenate([quants.quantize(part.numpy(), kind) for part in parts])
