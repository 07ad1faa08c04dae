"""Put the fast path on one model instance, say what was bound and what was not, and take it off again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from pronghorn.engine.binding import Binding, base_causal_lm, decoder_of
from pronghorn.engine.experts import mixture_classes
from pronghorn.engine.forward import causal_lm_forward, decoder_forward, image_text_forward, layer_forward
from pronghorn.engine.read import has_forward_of_its_own
from pronghorn.errors import BindingRefused
from pronghorn.families import ACTIVATIONS, STOCK, DecoderFamily, LayerParts, family_of
from pronghorn.kernels.attention import check_name
from pronghorn.weights import keep_four_bit_layout


def binding_of(model: Any) -> Binding | None:
    """The binding that `bind` left on a model, or None."""
    return getattr(base_causal_lm(model), "pronghorn_binding", None)


def bind(
    model: Any,
    *,
    strict: bool = False,
    save_levels: str | Sequence[str] = "all",
    attention: str | None = None,
) -> Binding:
    """Bind the fast path on a Transformers causal LM, on a decoder without a head, or on a PEFT model of either.

    Binding twice changes nothing but the attention, where one is named. A model of an unknown family stays stock,
    which is logged once.

    Args:
        strict: refuse a model that would stay stock.
        save_levels: what layers keep for backward, one of `blocks.LEVELS` or a list of them.
        attention: the attention implementation by name: "cudnn", "flash", "flex", "cpu", "sdpa" or "eager"
            (`kernels.attention.BACKENDS`); None takes the fastest one that does what the layers ask for.

    Raises:
        AttentionUnavailable: there is no attention of that name, or it cannot do this model's layers here.
        BindingRefused: with `strict=True`, when the model stays stock.
        UnknownSaveLevel: for a save level that does not exist.
    """
    check_name(attention)
    base = base_causal_lm(model)
    existing = binding_of(base)
    if existing is not None and (existing.bound or not strict):
        if attention is not None:
            existing.choose_attention(attention)
        return existing
    family = family_of(base.config.model_type) or DecoderFamily("unknown", (), "")
    family = family.for_config(base.config)
    reasons = _reasons_against(base, family)
    binding = Binding(base, family, reasons)
    if reasons:
        if strict:
            raise BindingRefused(
                f"{type(base).__name__} cannot take the fast path: {'; '.join(reasons)}",
                fix="load with strict=False to train on the stock forward",
            )
        binding.tell_once(f"{type(base).__name__} trains on its stock forward: {'; '.join(reasons)}")
        base.__dict__["pronghorn_binding"] = binding
        return binding
    binding.set_save_levels(save_levels)
    binding.choose_attention(attention)
    keep_four_bit_layout(base)
    for module, function in _sites(binding):
        _bind_forward(module, function, binding)
    for module in (base, binding.decoder):
        # Straight into __dict__: an attribute, not a submodule or buffer, so state dicts stay as they are.
        module.__dict__["pronghorn_binding"] = binding
    return binding


def _sites(binding: Binding) -> list[tuple[nn.Module, Any]]:
    head: list[tuple[nn.Module, Any]] = []
    if binding.model is not binding.decoder:
        head = [(binding.model, image_text_forward if binding.family.reads_images else causal_lm_forward)]
    layers = [(layer, layer_forward) for layer in binding.layers]
    return [*head, (binding.decoder, decoder_forward), *layers]


def _bind_forward(module: nn.Module, function: Any, binding: Binding) -> None:
    # accelerate's hooks replace `forward` and call `_old_forward`; ours belongs inside them.
    name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    binding._undo.append((module, name, module.__dict__.get(name)))
    setattr(module, name, partial(function, module))


def _reasons_against(model: Any, family: DecoderFamily) -> list[str]:
    """Everything that keeps a model off the fast path; empty when nothing does."""
    if not family.prefix:
        return [_why_unknown(model)]
    expected = (family.causal_lm or f"{family.prefix}ForCausalLM", family.decoder or f"{family.prefix}Model")
    if all(cls.__name__ not in expected for cls in type(model).__mro__):
        return [f"the {family.name} family was reviewed for {expected[0]}, this is {type(model).__name__}"]
    decoder = decoder_of(model, family)
    config, reasons = decoder.config, []
    activation = getattr(config, family.activation, None)
    if activation not in ACTIVATIONS:
        reasons.append(f"activation '{activation}' has no kernel")
    if getattr(config, "attention_dropout", 0.0):
        reasons.append(f"attention_dropout={config.attention_dropout}")
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        reasons.append(f"its parameters are spread over {', '.join(sorted(devices))}")
    unsupported = family.unsupported(config)
    if unsupported:
        reasons.append(unsupported)
    reasons += _missing_parts(decoder, family)
    named = [("the model", model), ("the decoder", decoder)]
    named += [(f"layers.{index}", layer) for index, layer in enumerate(decoder.layers)]
    replaced = next((name for name, module in named if has_forward_of_its_own(module)), None)
    if replaced is not None:
        reasons.append(f"{replaced} has a forward of its own")
    return reasons


def _why_unknown(model: Any) -> str:
    """What of a model without a family file stays stock: the classes of its layers, and what sets them apart."""
    kind, layers = model.config.model_type, getattr(model.config, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    reason = STOCK.get(kind, "not been reviewed")
    if not lists:
        return f"model type '{kind}' has no family file"
    layer = lists[0][0]
    parts = ", ".join(dict.fromkeys(type(child).__name__ for child in layer.children()))
    return f"model type '{kind}' has no family file; {type(layer).__name__} ({parts}) has {reason}"


def _missing_parts(decoder: Any, family: DecoderFamily) -> list[str]:
    """Classes and submodules that differ from the ones the family was reviewed for."""
    prefix = family.prefix
    found = {
        family.decoder or f"{prefix}Model": type(decoder).__name__,
        family.rotary or f"{prefix}RotaryEmbedding": type(getattr(decoder, "rotary_emb", None)).__name__,
    }
    for index, layer in enumerate(decoder.layers):
        parts = family.parts.of(layer)
        attention, mlp = getattr(layer, parts.attention, None), getattr(layer, parts.mlp, None)
        found[f"{prefix}DecoderLayer"] = type(layer).__name__
        found[f"{prefix}{'Attention' if parts.delta is None else 'GatedDeltaNet'}"] = type(attention).__name__
        if family.mlp(decoder.config, index) == "glu":
            found[family.mlp_class or f"{prefix}MLP"] = type(mlp).__name__
        elif family.mixture is not None:
            found |= mixture_classes(mlp, prefix, family.mixture)
        differing = [f"{name} is a {actual}" for name, actual in found.items() if name != actual]
        wanted = [(attention, n) for names in parts.attention_projections.values() for n in names]
        wanted += [(attention, n) for n in parts.attention_norms]
        wanted += [] if parts.delta is None else [(attention, parts.delta.conv)]
        if family.mlp(decoder.config, index) == "glu":
            wanted += [(mlp, n) for names in parts.mlp_projections for n in names]
        wanted += [(layer, n) for n in parts.norms]
        absent = [f"a layer lacks {name}" for parent, name in wanted if getattr(parent, name, None) is None]
        found_wrong = differing + absent or _unread_parts(layer, parts, family.mlp(decoder.config, index))
        if found_wrong:
            return found_wrong
    return []


def _unread_parts(layer: Any, parts: LayerParts, mlp: str) -> list[str]:
    """Modules with weights that a layer has and no block computes."""
    known: dict[str, set[str | None]] = {"": {parts.attention, parts.mlp, *parts.norms}}
    inner = (name for names in parts.attention_projections.values() for name in names)
    known[parts.attention] = {*inner, *parts.attention_norms}
    if parts.delta is not None:
        known[parts.attention].add(parts.delta.conv)
    if mlp == "glu":
        known[parts.mlp] = {name for names in parts.mlp_projections for name in names}
    return [
        f"{path}{'.' if path else ''}{name} is a {type(child).__name__} that the blocks do not compute"
        for path, names in known.items()
        for name, child in layer.get_submodule(path).named_children()
        if name not in names and next(child.parameters(), None) is not None
    ]
