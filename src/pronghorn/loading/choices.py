"""What `from_pretrained` was asked for in bits and products, and the `Options` that this comes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from pronghorn.hardware import Hardware
from pronghorn.loading.dynamic import choose_dynamic
from pronghorn.loading.fp8 import choose_fp8
from pronghorn.loading.int8 import choose_int8
from pronghorn.loading.model import Options
from pronghorn.loading.precision import choose_bits
from pronghorn.quantising.settings import DynamicQuantisation


@dataclass(frozen=True)
class AskedStorage:
    """How weights are to be stored: the arguments `load_in_4bit`, `load_in_8bit`, `full_finetuning`,
    `bnb_4bit_quant_type` and `bnb_4bit_use_double_quant`."""

    four_bit: bool | None
    eight_bit: bool
    trained: bool
    quant_type: str = "nf4"
    double_quant: bool = True


@dataclass(frozen=True)
class AskedInt8:
    """The arguments `load_in_int8`, `int8_skip_layers`, `int8_modules` and `int8_copies`."""

    wanted: bool = False
    skip_layers: int = 0
    modules: Iterable[str] | None = None
    copies: int = 2


@dataclass(frozen=True)
class AskedFp8:
    """The arguments `load_in_fp8`, `fp8_skip_layers`, `fp8_modules` and `fp8_copies`."""

    wanted: bool | str = False
    skip_layers: int | None = None
    modules: Iterable[str] | None = None
    copies: int = 1


NO_FP8 = AskedFp8()


def choose_options(
    dtype: torch.dtype,
    storage: AskedStorage,
    hardware: Hardware,
    int8: AskedInt8,
    fp8: AskedFp8 = NO_FP8,
    dynamic_4bit: bool | DynamicQuantisation = False,
) -> Options:
    """The bits, the 8-bit products and the rounding that were asked for, or that `hardware` decides.

    Raises:
        UnknownArgument: for values that do not exist or do not go together.
        PackageMissing: when quantisation was asked for and bitsandbytes is not installed.
        Fp8Unavailable, Int8Unavailable: on a GPU that cannot multiply so.
    """
    bits, why = choose_bits(storage.four_bit, storage.eight_bit, storage.trained, hardware)
    return Options(
        dtype=dtype,
        bits=bits,
        bits_reason=why,
        quant_type=storage.quant_type,
        double_quant=storage.double_quant,
        fp8=choose_fp8(
            fp8.wanted,
            hardware,
            bits=bits,
            full_finetuning=storage.trained,
            skip_layers=fp8.skip_layers,
            modules=fp8.modules,
            copies=fp8.copies,
        ),
        int8=choose_int8(
            int8.wanted,
            hardware,
            bits=bits,
            fp8=fp8.wanted,
            full_finetuning=storage.trained,
            skip_layers=int8.skip_layers,
            modules=int8.modules,
            copies=int8.copies,
        ),
        dynamic=choose_dynamic(
            dynamic_4bit,
            bits=bits,
            quant_type=storage.quant_type,
            eight_bit_products=bool(fp8.wanted or int8.wanted),
        ),
    )
