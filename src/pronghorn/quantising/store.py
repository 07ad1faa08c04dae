"""Quantised weights as bitsandbytes' modules in a model, which then is what Transformers would have loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pronghorn.quantising.formats import Stored


def four_bit_linear(module: nn.Linear, stored: Stored, dtype: torch.dtype) -> nn.Module:
    """The module with its weight in 4 bits, on the device where `stored` is; computes in `dtype`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        made = Linear4bit(
            module.in_features,
            module.out_features,
            module.bias is not None,
            dtype,
            compress_statistics=stored.form.double,
            quant_type="nf4",
        )
    packed, state = stored.pack(dtype)
    made.weight = Params4bit.from_prequantized(
        packed, state.as_dict(packed=True), requires_grad=False, device=packed.device, module=made
    )
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().to(packed.device), requires_grad=False)
    made.train(module.training)
    # As Transformers notes it on modules that it replaces.
    made.source_cls = type(module)  # type: ignore[assignment]
    return made


def mark_quantised(model: Any, dense: Iterable[str], dtype: torch.dtype, double: bool) -> None:
    """Leave on a model what Transformers leaves on one that it loads from such a checkpoint, for saving and PEFT.

    Args:
        dense: full names of the linear modules that stay unquantised.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=sorted(dense),
    )
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.is_loaded_in_4bit = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
