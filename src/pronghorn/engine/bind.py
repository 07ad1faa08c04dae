"""Put the fast path on one model instance, say what was bound and what was not, and take it off again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from pronghorn.blocks import LEVELS, Level, ModuleProjection, check_levels
from pronghorn.engine.forward import causal_lm_forward, decoder_forward, layer_forward
from pronghorn.engine.read import Reading, read_projection
from pronghorn.errors import BindingRefused
from pronghorn.families import ACTIVATIONS, DecoderFamily, family_of
from pronghorn.kernels.attention import choose_backend
from pronghorn.memory import HostStash
from pronghorn.weights import keep_four_bit_layout

logger = logging.getLogger("pronghorn")


@dataclass
class Binding:
    """What was bound on a causal LM. `reasons` says why the model stays stock; empty when it is bound."""

    model: Any
    family: DecoderFamily
    reasons: list[str]
    save_levels: tuple[Level, ...] = ()
    _told: set[str] = field(default_factory=set)
    _undo: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    @property
    def bound(self) -> bool:
        return not self.reasons

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def activation(self) -> str:
        return ACTIVATIONS[self.config.hidden_act]

    @property
    def layers(self) -> list[Any]:
        return list(self.model.model.layers)

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """The dtype that the first query projection asks to be multiplied in: its own; of a 4-bit weight the 16-bit
        compute dtype it was loaded with; None when it leaves that to its input."""
        projection = getattr(getattr(self.layers[0], self.family.parts.attention), self.family.parts.q)
        linear = getattr(projection, "base_layer", projection)
        if linear.weight.dtype.is_floating_point and getattr(linear.weight, "quant_state", None) is None:
            return linear.weight.dtype
        asked = getattr(linear, "compute_dtype", None)
        # fp32 is bitsandbytes' default, not somebody's wish.
        return asked if asked in (torch.bfloat16, torch.float16) else None

    def layer_index(self, layer: Any) -> int:
        return int(getattr(layer, self.family.parts.attention).layer_idx)

    def attention_backend(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """The attention implementation in use; its reason is told once."""
        backend, reason = choose_backend(device, dtype, head_dim)
        if backend == "sdpa":
            self.tell_once(f"attention runs document by document: {reason}")
        return backend

    def new_stash(self, device: torch.device) -> HostStash | None:
        """Host memory for one forward pass, where a layer's level asks for it and the device is a GPU."""
        if device.type != "cuda" or "offload" not in self.save_levels:
            return None
        return HostStash(copy_stream(device))

    def set_save_levels(self, levels: str | Sequence[str]) -> None:
        """Choose what layers keep for backward: one of offload, none, attention, matmuls, all; or a
        list, one a layer.

        Raises:
            UnknownSaveLevel: for another name or a list of the wrong length.
        """
        self.save_levels = check_levels(levels, self.config.num_hidden_layers)

    def tell_once(self, reason: str) -> None:
        """Log a fallback's reason the first time it is met on this model."""
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("pronghorn: %s", reason)

    def why_stock(
        self, decoder: Any, mask: Any, cache: Any, use_cache: bool | None, kwargs: dict[str, Any]
    ) -> str | None:
        """Why a call takes the stock decoder: None for the fast path, "" for an expected case (generation)."""
        wants_cache = decoder.config.use_cache if use_cache is None else use_cache
        if cache is not None or (wants_cache and not decoder.training and "cu_seq_lens_q" not in kwargs):
            return ""
        for request in ("output_hidden_states", "output_attentions"):
            if kwargs.get(request) or getattr(decoder.config, request, False):
                return f"{request} was asked for: this call runs the stock decoder"
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            return (
                "the attention mask is not a [batch, sequence] padding mask: this call runs the stock decoder"
            )
        return None

    def undo(self) -> None:
        """Take the fast path off; the model runs its stock forwards again."""
        for module, name, before in reversed(self._undo):
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)
        self._undo.clear()
        for module in (self.model, self.model.model):
            module.__dict__.pop("pronghorn_binding", None)

    def describe(self) -> str:
        """What is fast, what is not and why, as plain text."""
        name = type(self.model).__name__
        if not self.bound:
            return f"{name}: stock forward. " + "; ".join(self.reasons)
        parameter = next(self.model.parameters())
        dtype = self.weight_dtype or self.model.get_input_embeddings().weight.dtype
        attention = getattr(self.layers[0], self.family.parts.attention)
        backend, why = choose_backend(parameter.device, dtype, attention.head_dim)
        counts = ", ".join(
            f"{self.save_levels.count(level)}x {level}" for level in LEVELS if level in self.save_levels
        )
        lines = [
            f"{name} ({self.family.name} family): {len(self.layers)} layers in attention and GLU blocks, exact",
            f"  attention: {backend} ({why})",
            f"  save levels: {counts}",
            f"  weights: {', '.join(sorted(self._storages()))}",
        ]
        return "\n".join(lines + [f"  through its own module: {text}" for text in self._module_projections()])

    def _projections(self) -> list[tuple[str, Any]]:
        parts = self.family.parts
        found = []
        for index, layer in enumerate(self.layers):
            attention, mlp = getattr(layer, parts.attention), getattr(layer, parts.mlp)
            named = [(attention, n) for n in (parts.q, parts.k, parts.v, parts.o)]
            named += [(mlp, n) for n in (parts.gate, parts.up, parts.down)]
            for slot, (parent, part) in enumerate(named):
                projection = read_projection(getattr(parent, part), Reading(layer.training), slot)
                found.append((f"layers.{index}.{part}", projection))
        return found

    def _storages(self) -> set[str]:
        return {p.weight.storage for _, p in self._projections() if not isinstance(p, ModuleProjection)}

    def _module_projections(self) -> list[str]:
        """Projections outside the formulas, grouped by reason."""
        by_reason: dict[str, list[str]] = {}
        for path, projection in self._projections():
            if isinstance(projection, ModuleProjection):
                by_reason.setdefault(projection.reason, []).append(path)
        return [
            f"{len(paths)} projections (first {paths[0]}): {reason}" for reason, paths in by_reason.items()
        ]


@lru_cache(maxsize=16)
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that moves parked activations of a device; not kept on the model, which must stay picklable."""
    return torch.cuda.Stream(device)


def base_causal_lm(model: Any) -> Any:
    """The Transformers model inside a PEFT wrapper, or the model itself."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def binding_of(model: Any) -> Binding | None:
    """The binding that `bind` left on a model, or None."""
    return getattr(base_causal_lm(model), "pronghorn_binding", None)


def bind(model: Any, *, strict: bool = False, save_levels: str | Sequence[str] = "all") -> Binding:
    """Bind the fast path on a Transformers causal LM or a PEFT model of one. Binding twice changes nothing.

    A model of an unknown family stays stock, which is logged once.

    Raises:
        BindingRefused: with `strict=True`, when the model stays stock.
        UnknownSaveLevel: for a save level that does not exist.
    """
    base = base_causal_lm(model)
    existing = binding_of(base)
    if existing is not None and (existing.bound or not strict):
        return existing
    family = family_of(base.config.model_type) or DecoderFamily("unknown", (), "")
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
    keep_four_bit_layout(base)
    for module, function in _sites(base):
        _bind_forward(module, function, binding)
    for module in (base, base.model):
        # Straight into __dict__: an attribute, not a submodule or buffer, so state dicts stay as they are.
        module.__dict__["pronghorn_binding"] = binding
    return binding


def _sites(base: Any) -> list[tuple[nn.Module, Any]]:
    layers = [(layer, layer_forward) for layer in base.model.layers]
    return [(base, causal_lm_forward), (base.model, decoder_forward), *layers]


def _bind_forward(module: nn.Module, function: Any, binding: Binding) -> None:
    # accelerate's hooks replace `forward` and call `_old_forward`; ours belongs inside them.
    name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    binding._undo.append((module, name, module.__dict__.get(name)))
    setattr(module, name, partial(function, module))


def _reasons_against(model: Any, family: DecoderFamily) -> list[str]:
    """Everything that keeps a model off the fast path; empty when nothing does."""
    config = model.config
    if not family.prefix:
        return [f"model type '{config.model_type}' has no family file"]
    expected = f"{family.prefix}ForCausalLM"
    if all(cls.__name__ != expected for cls in type(model).__mro__):
        return [f"the {family.name} family was reviewed for {expected}, this is {type(model).__name__}"]
    reasons = []
    if getattr(config, "hidden_act", None) not in ACTIVATIONS:
        reasons.append(f"activation '{getattr(config, 'hidden_act', None)}' has no kernel")
    if getattr(config, "attention_dropout", 0.0):
        reasons.append(f"attention_dropout={config.attention_dropout}")
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        reasons.append(f"its parameters are spread over {', '.join(sorted(devices))}")
    unsupported = family.unsupported(config)
    if unsupported:
        reasons.append(unsupported)
    reasons += _missing_parts(model, family)
    return reasons


def _missing_parts(model: Any, family: DecoderFamily) -> list[str]:
    """Classes and submodules that differ from the ones the family was reviewed for."""
    parts, prefix = family.parts, family.prefix
    found = {
        f"{prefix}Model": type(model.model).__name__,
        f"{prefix}RotaryEmbedding": type(getattr(model.model, "rotary_emb", None)).__name__,
    }
    for layer in model.model.layers:
        attention, mlp = getattr(layer, parts.attention, None), getattr(layer, parts.mlp, None)
        found[f"{prefix}DecoderLayer"] = type(layer).__name__
        found[f"{prefix}Attention"] = type(attention).__name__
        found[f"{prefix}MLP"] = type(mlp).__name__
        differing = [f"{name} is a {actual}" for name, actual in found.items() if name != actual]
        wanted = [
            (attention, n) for n in (parts.q, parts.k, parts.v, parts.o, parts.q_norm, parts.k_norm) if n
        ]
        wanted += [(mlp, n) for n in (parts.gate, parts.up, parts.down)]
        wanted += [(layer, n) for n in (parts.input_norm, parts.post_attention_norm)]
        absent = [name for parent, name in wanted if not hasattr(parent, name)]
        if differing or absent:
            return differing + [f"a layer lacks {name}" for name in absent]
    return []
