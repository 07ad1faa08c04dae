"""What a model with adapters looks like as a plain checkpoint: names, shapes, dtypes, and how to make each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.engine import base_causal_lm
from pronghorn.errors import SaveFailed
from pronghorn.export.safetensors_file import Entry
from pronghorn.weights import read_weight
from pronghorn.weights.experts import four_bit_states, held_stack


@dataclass
class Plan:
    """All tensors of a merged checkpoint; `ties_broken` when head and embedding share no weight any more."""

    entries: list[Entry]
    ties_broken: bool = False

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


@dataclass
class _Found:
    """An entry with the stored tensor it comes from, None where an adapter changes it; equal sources are tied."""

    entry: Entry
    source: Tensor | None = field(default=None, repr=False)


def plan_merge(model: Any, dtype: torch.dtype | None = None) -> Plan:
    """Plan a merged checkpoint of a causal LM or PEFT model. No weight is computed or changed yet.

        W' = W + Σ_adapters s·B·A        (DoRA: m / ‖W + s·B·A‖ · (W + s·B·A)), in fp32, then rounded once

    Quantised weights are dequantised. The dtype, unless given, is the one the model computes in. Modules that PEFT
    trains whole take the original's place.

    Raises:
        SaveFailed: for a kind of adapter that has no merged form.
    """
    base = base_causal_lm(model)
    if dtype is None:
        dtype = base.config.dtype if isinstance(base.config.dtype, torch.dtype) else base.dtype
    found = {item.entry.name: item for item in _walk(base, "", dtype)}
    tied = tied_names(base)
    broken = False
    for copy, original in tied.items():
        if copy not in found or original not in found:
            continue
        same = found[copy].source is not None and found[copy].source is found[original].source
        if same:
            del found[copy]
        else:
            broken = True
    return Plan(_renamed(base, [item.entry for item in found.values()]), broken)


def adapted_weights(model: Any) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """Weights that active adapters change or replace: the name, and what makes it without and with them, in fp32."""
    for name, module in base_causal_lm(model).named_modules():
        prefix = (
            f"{name.replace('.base_layer', '')}."  # wrappers of several parameters stand one inside the other
        )
        if hasattr(module, "base_layer"):
            if adapters := _adapters_of(module, prefix):
                weight = f"{prefix}{getattr(module, 'parameter_name', 'weight')}"
                merged = _merged_weight(module, adapters, prefix, torch.float32)
                yield weight, partial(_plain_weight, module), merged
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            trained = dict(_trained_copy(module).named_parameters())
            for part, before in module.original_module.named_parameters():
                if trained[part] is not before:
                    yield f"{prefix}{part}", partial(_in_fp32, before), partial(_in_fp32, trained[part])


def _in_fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32)


def tied_names(base: Any) -> dict[str, str]:
    """Tied weights that are stored once: name of the copy -> name of the original."""
    if not getattr(base.config, "tie_word_embeddings", False):
        return {}
    keys = getattr(base, "_tied_weights_keys", None) or {}
    return dict(keys) if isinstance(keys, dict) else {}


def _walk(module: nn.Module, prefix: str, dtype: torch.dtype) -> Iterator[_Found]:
    """All tensors below a module under the names they have without PEFT."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        module = _trained_copy(module)
    if hasattr(module, "token_adapter"):
        raise _no_merged_form(prefix, "an adapter of single token rows (trainable_token_indices)")
    if hasattr(module, "base_layer"):
        yield from _adapted(module, prefix, dtype)
        return
    weight = read_weight(module) if _is_quantised(module) else None
    if weight is not None:
        name = f"{prefix}weight"
        yield _Found(Entry(name, weight.shape, dtype, lambda: weight.dense(torch.float32).to(dtype)))
    for name, state in four_bit_states(module).items():
        make = partial(_dequantised_stack, module, name, dtype)
        yield _Found(Entry(f"{prefix}{name}", tuple(state.shape), dtype, make))
    for name, tensor in _own_tensors(module):
        if weight is None or name == "bias":
            yield _plain(f"{prefix}{name}", tensor, dtype)
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", dtype)


def _is_quantised(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.dtype.is_floating_point


def _dequantised_stack(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    return held_stack(module, name).dense(torch.float32).to(dtype)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a module itself, but for stacks of experts in 4 bits."""
    yield from module.named_parameters(recurse=False)
    held = {part for name in four_bit_states(module) for part in (name, f"{name}_packed")}
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set and name not in held:
            yield name, buffer


def _plain(name: str, tensor: Tensor, dtype: torch.dtype) -> _Found:
    target = dtype if tensor.dtype.is_floating_point else tensor.dtype
    return _Found(Entry(name, tuple(tensor.shape), target, lambda: tensor.detach().to(target)), tensor)


def _trained_copy(wrapper: Any) -> nn.Module:
    for name in wrapper.active_adapters:
        if name in wrapper.modules_to_save:
            return wrapper.modules_to_save[name]
    return wrapper.original_module


def _adapted(module: Any, prefix: str, dtype: torch.dtype) -> Iterator[_Found]:
    """A layer wrapped by PEFT: its base layer's tensors, weight (and bias) with the active adapters added.

    A wrapper of one parameter (the experts of a mixture, `target_parameters`) adds to that one, and may be inside
    another for the same layer.

    Raises:
        SaveFailed: when an adapter would be lost.
    """
    adapters = _adapters_of(module, prefix)
    weight = f"{prefix}{getattr(module, 'parameter_name', 'weight')}"
    added = not adapters
    for item in _walk(module.base_layer, prefix, dtype):
        if adapters and item.entry.name == weight:
            yield _replaced(item, _merged_weight(module, adapters, prefix, dtype))
            added = True
        elif item.entry.name == f"{prefix}bias" and any(module.lora_bias.get(name) for name in adapters):
            yield _replaced(item, _merged_bias(module, adapters, dtype))
        else:
            yield item
    if not added:
        raise _no_merged_form(prefix, f"an adapter of the kind {type(module).__name__}")


def _replaced(item: _Found, make: Callable[[], Tensor]) -> _Found:
    entry = item.entry
    return _Found(Entry(entry.name, entry.shape, entry.dtype, make))


def _adapters_of(module: Any, prefix: str) -> list[str]:
    """Active adapters that are not in the base weight yet.

    Raises:
        SaveFailed: where they cannot be added to it.
    """
    if not hasattr(module, "get_delta_weight"):
        raise _no_merged_form(prefix, f"an adapter of the kind {type(module).__name__}")
    known = {*getattr(module, "lora_A", {}), *getattr(module, "lora_embedding_A", {})}
    names = [name for name in module.active_adapters if name in known and name not in module.merged_adapters]
    if any(name in module.lora_variant for name in names) and len(names) + len(module.merged_adapters) > 1:
        raise _no_merged_form(prefix, "several active adapters, one of them DoRA or another variant")
    has_bias = getattr(module.base_layer, "bias", None) is not None
    if any(module.lora_bias.get(name) for name in names) and not has_bias:
        raise _no_merged_form(prefix, "an adapter with a bias on a layer without one")
    return names


def _merged_weight(module: Any, adapters: list[str], prefix: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def make() -> Tensor:
        with torch.no_grad():
            merged = _plain_weight(module)
            for name in adapters:
                if name in module.lora_variant:
                    merged = _merge_variant(module, name, merged, prefix)
                else:
                    merged = merged + _delta(module, name)
        return _rounded(merged, dtype, prefix)

    return make


def _delta(module: Any, name: str) -> Tensor:
    """s·B·A in fp32. PEFT's own rounds it to the adapter's dtype, so a 16-bit adapter is multiplied out here."""
    parts = [getattr(module, part) for part in ("lora_A", "lora_B") if hasattr(module, part)]
    weights = [part[name].weight for part in parts if name in part and isinstance(part[name], nn.Linear)]
    low = len(weights) == 2 and weights[0].dtype.itemsize == 2
    if not low or module.fan_in_fan_out or hasattr(module, "get_param"):
        return module.get_delta_weight(name).to(torch.float32)  # type: ignore[no-any-return]
    a, b = (weight.detach().to(torch.float32) for weight in weights)
    return (b @ a).mul_(module.scaling[name])


def _rounded(merged: Tensor, dtype: torch.dtype, prefix: str) -> Tensor:
    """The weight in `dtype`.

    Raises:
        SaveFailed: a finite weight is beyond the range of `dtype` (65,504 in float16).
    """
    rounded = merged.to(dtype)
    if dtype == torch.float16 and bool((rounded.isinf() & merged.isfinite()).any()):
        raise SaveFailed(
            f"{prefix}weight with its adapter has values beyond the range of float16",
            fix="load the model in bfloat16 or float32 and save again, or keep the adapter: save_method='lora'",
        )
    return rounded


def _plain_weight(module: Any) -> Tensor:
    """The weight without adapters, in fp32."""
    if hasattr(module, "get_param"):
        if module.parameter_name in four_bit_states(module.get_base_layer()):
            return _dequantised_stack(module.get_base_layer(), module.parameter_name, torch.float32)
        return module.get_param().detach().to(torch.float32)
    stored = read_weight(module.base_layer)
    return (
        module.base_layer.weight.detach().to(torch.float32) if stored is None else stored.dense(torch.float32)
    )


def _merge_variant(module: Any, name: str, weight: Tensor, prefix: str) -> Tensor:
    """DoRA and its like know their own formula; PEFT's `merge_safe` returns a new weight and leaves the layer alone."""
    try:
        merged = module.lora_variant[name].merge_safe(module, name, weight)
    except NotImplementedError as error:
        raise _no_merged_form(prefix, f"a {type(module.lora_variant[name]).__name__}") from error
    # merge_safe keeps the norm for a later unmerge, which will not come.
    module._caches.pop(f"{name}-weight_norm", None)
    return merged


def _merged_bias(module: Any, adapters: list[str], dtype: torch.dtype) -> Callable[[], Tensor]:
    """The base's bias plus s·b of every adapter whose B has one."""

    def make() -> Tensor:
        bias = module.base_layer.bias.detach().to(torch.float32)
        for name in adapters:
            if module.lora_bias.get(name):
                bias = bias + module.scaling[name] * module.lora_B[name].bias.detach().to(torch.float32)
        return bias.to(dtype)

    return make


def _no_merged_form(prefix: str, what: str) -> SaveFailed:
    return SaveFailed(
        f"{prefix.rstrip('.') or 'the model'} has {what}, which cannot be merged into the weights",
        fix="save the adapter instead: save_method='lora'",
    )


def _renamed(base: Any, entries: list[Entry]) -> list[Entry]:
    """Entries under the names of the published checkpoint, where Transformers only renames on loading.

    Where it also splits or joins tensors, the names in memory stay: Transformers loads those as well.
    """
    from transformers.core_model_loading import revert_weight_conversion

    placeholders = {
        entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries
    }
    try:
        reverted = revert_weight_conversion(base, dict(placeholders))
    except (ValueError, KeyError, RuntimeError, NotImplementedError):
        return entries
    by_identity = {id(tensor): name for name, tensor in reverted.items()}
    if len(reverted) != len(entries) or any(id(t) not in by_identity for t in placeholders.values()):
        return entries
    return [
        Entry(by_identity[id(placeholders[entry.name])], entry.shape, entry.dtype, entry.make)
        for entry in entries
    ]
