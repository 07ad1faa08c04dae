"""What somebody laid over modules whose work the blocks do themselves: a call on such a model runs the stock decoder.

Hooks and replaced forwards of a projection are not meant here; the block runs such a projection through its module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pronghorn.engine.experts import why_stock_experts
from pronghorn.engine.read import active_module, runs_more_than_its_class, runs_more_than_the_binding
from pronghorn.families import LayerParts, MixtureParts

#: What PEFT's forward hooks hand to an adapter together with rows [B, S, H], which one stream does not have.
_ROW_ARGUMENTS = {
    "adapter_names": "each row has its own adapter (adapter_names)",
    "alora_offsets": "an activated LoRA (aLoRA) works on rows",
}


def altered_part(decoder: Any, parts: LayerParts, mixture: MixtureParts | None = None) -> str | None:
    """The first module of a decoder that only its own forward can run, and why; None when there is none."""
    reason = _why_altered(decoder.norm)
    if reason is not None:
        return f"norm {reason}"
    for index, layer in enumerate(decoder.layers):
        reason = None if mixture is None else why_stock_experts(layer._modules[parts.mlp], mixture)
        if reason is not None:
            return f"layers.{index}.{parts.mlp}.{reason}"
        here = parts.of(layer)
        for name, module in _replaced(layer, here):
            reason = _why_altered(module)
            if reason is not None:
                return f"layers.{index}.{name} {reason}"
        for module in _projections(layer, here):
            reason = _why_rows(module)
            if reason is not None:
                return reason
    return None


def altered_whole(model: Any, decoder: Any) -> str | None:
    """What the model, its decoder or a layer does besides when it is called; None for nothing. Only who calls none of
    them has to know: hooks that steer layers, a forward laid over the model."""
    within = getattr(model, "model", model)
    for name, module in (("the model", model), ("the model in it", within), ("the decoder", decoder)):
        if runs_more_than_the_binding(module):
            return f"{name} has hooks or a forward of its own"
    for index, layer in enumerate(decoder.layers):
        if runs_more_than_the_binding(layer):
            return f"layers.{index} has hooks or a forward of its own"
    # Virtual tokens of prompt tuning come in here; what PEFT leaves behind otherwise is the class's own.
    prepared = model.__dict__.get("prepare_inputs_for_generation")
    usual = type(model).prepare_inputs_for_generation
    if prepared is not None and getattr(prepared, "__func__", None) is not usual:
        return "its inputs are prepared by a function of its own, as PEFT's virtual tokens are"
    return None


def _replaced(layer: Any, parts: LayerParts) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a layer whose forward the blocks never call."""
    # Children are looked up directly: nn.Module's attribute lookup, for every layer of every step, costs milliseconds.
    children = layer._modules
    if parts.delta is not None:
        yield f"{parts.attention}.{parts.delta.conv}", children[parts.attention]._modules[parts.delta.conv]
    for name in (parts.attention, parts.mlp, *parts.norms):
        yield name, children[name]
    inner = [(parts.attention, name) for name in parts.attention_norms]
    for parent, child in [*inner, (parts.mlp, parts.activation)]:
        module = children[parent]._modules.get(child)
        if module is not None:
            yield f"{parent}.{child}", module


def _projections(layer: Any, parts: LayerParts) -> Iterator[nn.Module]:
    for parent, groups in (
        (parts.attention, parts.attention_projections.values()),
        (parts.mlp, parts.mlp_projections),
    ):
        children = layer._modules[parent]._modules
        # A layer may have an MLP of another kind than the family's dense one.
        yield from (children[name] for names in groups for name in names if name in children)


def _why_altered(module: nn.Module) -> str | None:
    module = active_module(module)
    if runs_more_than_its_class(module):
        return "has hooks or a forward of its own"
    if "base_layer" in module._modules:
        return f"is wrapped in a {type(module).__name__}"
    return None


def _why_rows(projection: nn.Module) -> str | None:
    for hook in projection._forward_pre_hooks.values():
        for name in getattr(hook, "keywords", ()):
            if name in _ROW_ARGUMENTS:
                return _ROW_ARGUMENTS[name]
    return None
