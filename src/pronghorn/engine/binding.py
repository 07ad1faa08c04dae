"""What is bound on one model instance: save levels, dtypes and attention in use, and what `describe` says of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.blocks import LEVELS, Level, ModuleProjection, check_levels, gated_products, parks
from pronghorn.blocks.projection import Projection
from pronghorn.engine.altered import altered_part
from pronghorn.engine.experts import read_mixture
from pronghorn.engine.flat import FlatAdapters
from pronghorn.engine.read import Reading, group_names, read_groups
from pronghorn.errors import AttentionUnavailable
from pronghorn.families import ACTIVATIONS, MOE, DecoderFamily, Scales
from pronghorn.kernels.attention import INSTALL_CUDNN, check_name, choose_backend
from pronghorn.memory import HostPool, HostStash

logger = logging.getLogger("pronghorn")

#: instead of a save level: a trainer that knows its largest batch chooses them for the memory that is free
AUTO = "auto"


@dataclass
class Binding:
    """What was bound on a causal LM. `reasons` says why the model stays stock; empty when it is bound."""

    model: Any
    family: DecoderFamily
    reasons: list[str]
    save_levels: tuple[Level, ...] = ()
    #: nobody has chosen save levels: `save_levels` are the leanest, until a trainer plans them
    automatic: bool = False
    #: an attention implementation by name (`choose_attention` sets it); None: the fastest
    attention: str | None = None
    #: most rows of the widest tensors that exist at a time where no level keeps them; None: the blocks' own choice
    tile_rows: int | None = None
    #: adapters and gradients lie where a `TrainingStep` wants them: what a plan measures is there
    laid_out: bool = False
    #: bytes that a plan has left over, which weights may take that are laid side by side; None: nobody has planned
    spare: int | None = None
    #: bytes that a recorded step is to ask for at once (`memory.Estimate.piece`)
    piece: int = 0
    #: bytes of the weights where they lie in another process's memory, which this one only reads
    elsewhere: int = 0
    #: the adapters' flat storage while a `TrainingStep` runs; else None, and every call reads PEFT's own tensors
    packed: FlatAdapters | None = None
    #: LongRoPE's frequencies for short and for long streams, by device (`engine.angles`)
    frequencies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    _undo: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    @property
    def bound(self) -> bool:
        return not self.reasons

    @property
    def config(self) -> Any:
        """The decoder's configuration."""
        return self.decoder.config if self.family.reads_images else self.model.config

    @property
    def activation(self) -> str:
        return ACTIVATIONS[getattr(self.config, self.family.activation)]

    @cached_property
    def scales(self) -> Scales:
        """Factors and caps that the config sets."""
        return self.family.scales(self.config)

    @cached_property
    def rotations(self) -> tuple[str | None, ...]:
        """The kinds of angles that layers rotate by, each once; None where some do not."""
        count = self.config.num_hidden_layers
        return tuple(dict.fromkeys(self.family.rotation(self.config, index) for index in range(count)))

    @property
    def decoder(self) -> Any:
        """The embedding, layers and final norm: a part of a causal LM, or a model that was loaded without a head."""
        return decoder_of(self.model, self.family)

    @property
    def layers(self) -> list[Any]:
        return list(self.decoder.layers)

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """The dtype that the first query projection asks to be multiplied in: its own; of a 4-bit weight the 16-bit
        compute dtype it was loaded with; None when it leaves that to its input."""
        parts = self.family.parts.of(self.layers[0])
        first = next(iter(parts.attention_projections.values()))[0]
        projection = getattr(getattr(self.layers[0], parts.attention), first)
        linear = getattr(projection, "base_layer", projection)
        if linear.weight.dtype.is_floating_point and getattr(linear.weight, "quant_state", None) is None:
            return linear.weight.dtype
        asked = getattr(linear, "compute_dtype", None)
        # fp32 is bitsandbytes' default, not somebody's wish.
        return asked if asked in (torch.bfloat16, torch.float16) else None

    def layer_index(self, layer: Any) -> int:
        return int(getattr(layer, self.family.parts.of(layer).attention).layer_idx)

    def attention_backend(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        *,
        window: bool = False,
        both_ways: bool = False,
    ) -> str:
        """The attention implementation in use: `attention`, or the fastest. Why it is a slow one is told once.

        Args:
            both_ways: tokens see what follows them in this call (`Documents.seen_to`); one that cannot do that is then
                not taken, though it was asked for.
        """
        wanted = self.attention
        if both_ways and wanted is not None:
            try:
                return self._choose_backend(device, dtype, head_dim, window, wanted, both_ways)[0]
            except AttentionUnavailable as refusal:
                self.tell_once(f"batches with images take another attention: {refusal.message}")
                wanted = None
        backend, reason = self._choose_backend(device, dtype, head_dim, window, wanted, both_ways)
        slow = backend in ("sdpa", "eager") or (backend == "flash" and INSTALL_CUDNN in reason)
        if slow and self.attention is None:
            self.tell_once(f"attention: {reason}")
        return backend

    def _choose_backend(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        window: bool,
        wanted: str | None,
        both_ways: bool = False,
    ) -> tuple[str, str]:
        softcap = self.scales.attention_softcap is not None
        sinks = self.family.parts.sinks is not None
        return choose_backend(
            device,
            dtype,
            head_dim,
            window=window,
            softcap=softcap,
            sinks=sinks,
            both_ways=both_ways,
            wanted=wanted,
        )

    def windowed(self) -> list[bool]:
        """The kinds of layers there are: without a window, with one, or both."""
        kinds = {
            self.family.window(self.config, self.layer_index(layer)) is not None for layer in self.layers
        }
        return sorted(kinds)

    def choose_attention(self, name: str | None) -> None:
        """Use the attention implementation of a name (`kernels.attention.BACKENDS`) from now on; None: the fastest.

        A model on the CPU may move to a GPU and one in fp32 be trained under autocast, so what suits either is taken.

        Raises:
            AttentionUnavailable: there is none of that name, or it cannot do this model's layers here.
        """
        check_name(name)
        if name is not None and self.bound:
            here = next(self.model.parameters()).device
            devices = [
                here,
                *([torch.device("cuda")] if here.type == "cpu" and torch.cuda.is_available() else []),
            ]
            dtypes = [self._attention_dtype()]
            if dtypes == [torch.float32]:
                dtypes += [torch.bfloat16, torch.float16]
            refusals = []
            for device, dtype in product(devices, dtypes):
                try:
                    for window in self.windowed():
                        self._choose_backend(device, dtype, self.head_dim, window, name)
                except AttentionUnavailable as refusal:
                    refusals.append(refusal)
                else:
                    break
            else:
                raise refusals[0]
        self.attention = name

    @property
    def head_dim(self) -> int:
        """The size of a head of q and k."""
        parts = self.family.parts
        attention = next(getattr(layer, parts.attention) for layer in self.layers if parts.of(layer) is parts)
        return int(attention.head_dim if parts.latent is None else attention.qk_head_dim)

    def _attention_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.weight_dtype or self.model.get_input_embeddings().weight.dtype
        return dtype

    def _describe_attention(self) -> list[str]:
        device = next(self.model.parameters()).device
        lines = []
        for window in self.windowed():
            which = "attention in a window" if window and len(self.windowed()) > 1 else "attention"
            try:
                backend, why = self._choose_backend(
                    device, self._attention_dtype(), self.head_dim, window, self.attention
                )
                lines.append(f"  {which}: {backend} ({why})")
            except AttentionUnavailable as refusal:
                lines.append(f"  {which}: {refusal}")
        return lines

    def _describe_latent(self) -> list[str]:
        """How heads that are made of codes go through kernels for heads of one size."""
        if self.family.parts.latent is None:
            return []
        found, keys, values = (
            "  latent attention: q, k and v are made of codes",
            self.head_dim,
            self.config.v_head_dim,
        )
        if values == keys:
            return [found]
        return [
            f"{found}; values of {values} columns are padded to the keys' {keys}, the kernels' one size of heads"
        ]

    def _describe_recurrent(self) -> list[str]:
        parts = self.family.parts
        count = sum(parts.of(layer) is not parts for layer in self.layers)
        return [f"  linear attention: the gated delta rule in {count} layers"] if count else []

    def new_stash(self, device: torch.device) -> HostStash | None:
        """Host memory for one forward pass, where a layer's level asks for it and the device is a GPU."""
        if device.type != "cuda" or not any(map(parks, self.save_levels)):
            return None
        return HostStash(copy_stream(device), host_pool(device), self.tell_once)

    def set_save_levels(self, levels: str | Sequence[str]) -> None:
        """Choose what layers keep for backward: one of `blocks.LEVELS`, or a list of them, one a layer; "auto" leaves
        it to the trainer, and takes the leanest until then.

        Raises:
            UnknownSaveLevel: for another name or a list of the wrong length.
        """
        automatic = levels == AUTO
        self.save_levels = check_levels("offload" if automatic else levels, self.config.num_hidden_layers)
        self.automatic, self.spare = automatic, None

    def use_plan(self, levels: Sequence[str], tile_rows: int | None) -> None:
        """Take the levels that a plan chose; another trainer may plan anew."""
        self.save_levels = check_levels(levels, self.config.num_hidden_layers)
        self.tile_rows = tile_rows

    def save_level(self, index: int) -> Level:
        """What layer `index` keeps; layers that came later (PEFT's layer_replication) do as the last one."""
        return self.save_levels[min(index, len(self.save_levels) - 1)]

    def tell_once(self, reason: str) -> None:
        """Log a fallback's reason the first time it is met on this model."""
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("pronghorn: %s", reason)

    def why_stock(
        self,
        decoder: Any,
        mask: Any,
        cache: Any,
        use_cache: bool | None,
        kwargs: dict[str, Any],
        balanced: bool = False,
    ) -> str | None:
        """Why a call takes the stock decoder: None for the fast path, "" for an expected case (generation). `balanced`:
        of routers only their balance is wanted."""
        wants_cache = decoder.config.use_cache if use_cache is None else use_cache
        if cache is not None or (wants_cache and not decoder.training and "cu_seq_lens_q" not in kwargs):
            return ""
        requests = ["output_hidden_states", "output_attentions"]
        for request in requests if balanced else [*requests, "output_router_logits"]:
            if kwargs.get(request) or getattr(decoder.config, request, False):
                return f"{request} was asked for: this call runs the stock decoder"
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            return (
                "the attention mask is not a [batch, sequence] padding mask: this call runs the stock decoder"
            )
        altered = altered_part(decoder, self.family.parts, self.family.mixture)
        return altered and f"{altered}: this call runs the stock decoder"

    def undo(self) -> None:
        """Take the fast path off; the model runs its stock forwards again."""
        for module, name, before in reversed(self._undo):
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)
        self._undo.clear()
        for module in (self.model, self.decoder):
            module.__dict__.pop("pronghorn_binding", None)

    def describe(self) -> str:
        """What is fast, what is not and why, as plain text."""
        name = type(self.model).__name__
        if not self.bound:
            return f"{name}: stock forward. " + "; ".join(self.reasons)
        counts = ", ".join(
            f"{self.save_levels.count(level)}x {level}" for level in LEVELS if level in self.save_levels
        )
        linear = [p.weight for _, p in self.projections() if not isinstance(p, ModuleProjection)]
        mixtures = (layer for layer in self.layers if self.mlp_of(layer) == MOE)
        mixture = read_mixture(self.family, self.config, mixtures)
        label = (
            "quantised"
            if any(weight.label == "quantised" for weight in (*linear, *mixture.weights))
            else "exact"
        )
        lines = [
            f"{name} ({self.family.name} family): {len(self.layers)} layers in attention and GLU blocks, {label}",
            *self._describe_attention(),
            *self._describe_latent(),
            *self._describe_recurrent(),
            *self._describe_units(),
            f"  save levels: {counts}",
            f"  weights: {', '.join(sorted({weight.storage for weight in linear}))}",
            *mixture.lines,
        ]
        altered = altered_part(self.decoder, self.family.parts, self.family.mixture)
        if altered is not None:
            lines.append(f"  the stock decoder runs for now: {altered}")
        return "\n".join(lines + [f"  through its own module: {text}" for text in self._module_projections()])

    def _describe_units(self) -> list[str]:
        """Whether the products around gated units make them."""
        embedding = self.model.get_input_embeddings().weight
        where = embedding.device, self.weight_dtype or embedding.dtype
        if any(self.mlp_of(layer) == MOE for layer in self.layers):  # shared experts go apart
            return []
        groups = (self.groups(layer, Reading(layer.training)) for layer in self.layers)
        if not all(gated_products.suits_block(found, *where) for found in groups):
            return []
        return ["  gated units: in the products around them, where weights are in 16 bits"]

    def projections(self) -> list[tuple[str, Any]]:
        """Every projection of the layers as a forward would read it now, with its path."""
        found = []
        for index, layer in enumerate(self.layers):
            groups = self.groups(layer, Reading(layer.training))
            for slot, (_, names) in self._group_names(layer).items():
                found += [(f"layers.{index}.{name}", p) for name, p in zip(names, groups[slot], strict=True)]
        return found

    def mlp_of(self, layer: Any) -> str:
        """Which kind of MLP a layer has, a key of `engine.forward.MLP_BLOCKS`."""
        return self.family.mlp(self.config, self.layer_index(layer))

    def groups(self, layer: Any, reading: Reading) -> dict[int, list[Projection]]:
        """A layer's projections, those that share their input together (`read_groups`)."""
        return read_groups(layer, self.family.parts, reading, self.mlp_of(layer), self.family.mixture)

    def all_groups(self) -> dict[tuple[int, int], list[Projection]]:
        """`groups` of all layers in training, by (layer, slot)."""
        return {
            (self.layer_index(layer), slot): found
            for layer in self.layers
            for slot, found in self.groups(layer, Reading(True)).items()
        }

    def _group_names(self, layer: Any) -> dict[int, tuple[str, tuple[str, ...]]]:
        return group_names(self.family.parts.of(layer), self.mlp_of(layer), self.family.mixture)

    def _module_projections(self) -> list[str]:
        """Projections outside the formulas, grouped by reason."""
        by_reason: dict[str, list[str]] = {}
        for path, projection in self.projections():
            if isinstance(projection, ModuleProjection):
                by_reason.setdefault(projection.reason, []).append(path)
        return [
            f"{len(paths)} projections (first {paths[0]}): {reason}" for reason, paths in by_reason.items()
        ]


@lru_cache(maxsize=16)
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that moves parked activations of a device; not kept on the model, which must stay picklable."""
    return torch.cuda.Stream(device)


@lru_cache(maxsize=16)
def host_pool(device: torch.device) -> HostPool:
    """The pinned memory that a device's activations are parked in, kept for the next pass."""
    return HostPool()


def decoder_of(model: Any, family: DecoderFamily) -> Any:
    """The decoder in a Transformers model of a family, or the model where it is one."""
    whole = family.reads_images and hasattr(model, "model")
    return model.get_submodule(family.path) if whole else model.base_model


def base_causal_lm(model: Any) -> Any:
    """The Transformers model inside a PEFT wrapper, or the model itself."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )
