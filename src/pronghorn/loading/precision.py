"""Which dtype, and which quantisation, a model is loaded in; every choice with its reason."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch

from pronghorn.errors import PackageMissing, UnknownArgument, nearest
from pronghorn.hardware import Fact, Hardware

logger = logging.getLogger("pronghorn")

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


def choose_dtype(dtype: str | torch.dtype | None, hardware: Hardware) -> Fact:
    """The dtype of weights and matrix products, a `torch.dtype`, with the reason.

    Raises:
        UnknownArgument: for a name that is no floating-point dtype to train in.
    """
    if dtype is None:
        return Fact(DTYPES[hardware.compute_dtype.value], hardware.compute_dtype.reason)
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        if name not in DTYPES:
            raise UnknownArgument(
                f"dtype='{dtype}' does not exist",
                fix=nearest(name, DTYPES) or f"use one of {', '.join(DTYPES)}",
            )
        dtype = DTYPES[name]
    if dtype not in DTYPES.values():
        raise UnknownArgument(f"{dtype} is not a dtype to train in", fix="use bfloat16, float16 or float32")
    if dtype is torch.bfloat16 and hardware.compute_dtype.value == "float16":
        logger.warning(
            "pronghorn: bfloat16 was asked for, but %s: it will be slow", hardware.compute_dtype.reason
        )
    return Fact(dtype, "asked for")


def choose_bits(
    load_in_4bit: bool | None, load_in_8bit: bool, full_finetuning: bool, hardware: Hardware
) -> tuple[int, str]:
    """4, 8 or 16 (unquantised) bits for the linear layers' weights, and the reason.

    Raises:
        UnknownArgument: for two quantisations at once, or quantised weights that are to be trained.
        PackageMissing: when quantisation was asked for and bitsandbytes is not installed.
    """
    if load_in_4bit and load_in_8bit:
        raise UnknownArgument("load_in_4bit and load_in_8bit exclude each other", fix="leave out one of them")
    if full_finetuning:
        if load_in_8bit:
            raise UnknownArgument(
                "8-bit weights cannot be trained", fix="leave out load_in_8bit or full_finetuning"
            )
        return 16, "full_finetuning trains the weights themselves"
    installed = find_spec("bitsandbytes") is not None
    if load_in_4bit or load_in_8bit:
        if not installed:
            raise PackageMissing(
                f"load_in_{4 if load_in_4bit else 8}bit needs the package bitsandbytes, which is not installed",
                fix="pip install bitsandbytes, or load without quantisation",
            )
        return (4 if load_in_4bit else 8), "asked for"
    if load_in_4bit is False or load_in_8bit is None:
        return 16, "asked for"
    if not hardware.is_cuda:
        return 16, "no CUDA GPU: 4-bit weights would be slow here"
    if not installed:
        return 16, "the package bitsandbytes, which quantises, is not installed"
    return 4, "the default on a CUDA GPU"


#: What stays unquantised of a model that reads images: its head, and the parts that see.
_UNQUANTISED = (
    "lm_head", "model.visual", "model.vision_tower", "model.vision_model", "model.multi_modal_projector",
    "model.connector",
)  # fmt: skip


def quantisation(
    bits: int, dtype: torch.dtype, *, quant_type: str, double_quant: bool, images: bool = False
) -> Any:
    """Transformers' config for bitsandbytes at 4 or 8 bits, None at 16.

    lm_head stays unquantised, as in every bitsandbytes checkpoint, and so does a vision tower.

    Raises:
        UnknownArgument: for a 4-bit type other than nf4 and fp4.
    """
    from transformers import BitsAndBytesConfig

    if bits == 16:
        return None
    skipped = list(_UNQUANTISED) if images else None
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    if quant_type not in ("nf4", "fp4"):
        raise UnknownArgument(f"bnb_4bit_quant_type='{quant_type}' does not exist", fix="use nf4 or fp4")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )
