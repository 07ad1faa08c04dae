"""A speech model's projections in bitsandbytes' NF4, as QLoRA stores them."""

from __future__ import annotations

import torch
from torch import nn

from pronghorn.speech.model import DualARModel


def to_four_bits(model: DualARModel) -> None:
    """Put modules of bitsandbytes in the place of both transformers' projections; moving them to a device quantises.

    Embeddings, norms and heads stay as they are.
    """
    for decoder in (model.slow, model.fast):
        for layer in decoder.model.layers:
            linears = [(name, module) for name, module in layer.named_modules() if type(module) is nn.Linear]
            for name, linear in linears:
                parent, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(parent), attribute, _quantised(linear))
    # What PEFT asks before it puts an adapter on such modules.
    model.is_loaded_in_4bit = True


def _quantised(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    options = {"quant_type": "nf4", "compress_statistics": True}
    with torch.device("meta"):
        module = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, **options
        )
    module.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=module, **options)
    module.bias = linear.bias
    return module
