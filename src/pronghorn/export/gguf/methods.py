"""The names of GGUF's formats: what each is called, who can write it, and how far it may be from the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pronghorn.errors import UnknownArgument, nearest
from pronghorn.export.gate import Limits

#: Formats this package writes itself.
NATIVE = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
#: Formats that llama.cpp's own quantiser writes, from a 16-bit or 32-bit file.
BY_LLAMA_CPP = (
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q4_k_m",
    "q4_k_s",
    "q3_k_l",
    "q3_k_m",
    "q3_k_s",
    "q2_k",
    "iq4_nl",
    "iq4_xs",
)
#: Other names for them, most of them Unsloth's.
ALIASES = {
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q8": "q8_0",
    "q6": "q6_k",
    "q5_k": "q5_k_m",
    "q4_k": "q4_k_m",
    "q3_k": "q3_k_m",
    "float32": "f32",
    "fp32": "f32",
    "float16": "f16",
    "fp16": "f16",
    "bfloat16": "bf16",
}
#: The model's own precision.
AS_COMPUTED = "not_quantized"

_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

#: By the bits of a weight.
_LIMITS = {
    32: Limits(0.01, 0.02),
    16: Limits(0.01, 0.02),
    8: Limits(0.03, 0.04),
    6: Limits(0.06, 0.06),
    5: Limits(0.15, 0.10),
    4: Limits(0.45, 0.25),
    3: Limits(1.0, 0.45),
    2: Limits(3.0, 0.85),
}


@dataclass(frozen=True)
class Method:
    """A format of GGUF.

    Args:
        name: in lower case, as `quantization_method` takes it.
    """

    name: str

    @property
    def file_part(self) -> str:
        """How files are called after it: Q8_0, BF16."""
        return self.name.upper()

    @property
    def native(self) -> bool:
        return self.name in NATIVE

    @property
    def bits(self) -> int:
        """Of a stored weight, without its scales."""
        return int(self.name.lstrip("bfiq").split("_")[0])

    @property
    def limits(self) -> Limits:
        """What a file of this format may differ by from the model."""
        return _LIMITS[self.bits]

    @property
    def file_type(self) -> int:
        """llama.cpp's number of it."""
        from gguf import LlamaFileType

        return int(LlamaFileType[f"{'ALL' if self.name == 'f32' else 'MOSTLY'}_{self.file_part}"])

    def bytes_of(self, elements: int) -> int:
        """About how large that many weights become: 32 of them share a scale of 16 bits."""
        return elements * self.bits // 8 + (elements // 16 if self.bits < 16 else 0)


def resolve(methods: str | Sequence[str], dtype: torch.dtype) -> list[Method]:
    """The formats asked for, each once, in the order asked for.

    Args:
        dtype: what the model computes in, for "not_quantized".

    Raises:
        UnknownArgument: for a name that is none, with the nearest that is one.
    """
    asked = [methods] if isinstance(methods, str) else list(methods)
    if not asked:
        raise UnknownArgument("quantization_method is an empty list", fix="name one, such as 'q8_0'")
    known = (*NATIVE, *BY_LLAMA_CPP)
    found: list[Method] = []
    for given in asked:
        name = str(given).strip().lower().replace("-", "_")
        name = _OF_DTYPE.get(dtype, "f16") if name == AS_COMPUTED else ALIASES.get(name, name)
        if name not in known:
            near = nearest(name, [*known, *ALIASES, AS_COMPUTED])
            raise UnknownArgument(
                f"quantization_method='{given}' does not exist",
                fix=f"{near}; all: {', '.join(known)}" if near else f"use one of {', '.join(known)}",
            )
        if Method(name) not in found:
            found.append(Method(name))
    return found
