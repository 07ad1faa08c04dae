"""A bound model as inference reads it: its layers' weights in the trainer's own storage, and all of its adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.blocks import Adapter, LinearProjection, NoNorm, Norm
from pronghorn.engine import bind
from pronghorn.engine.altered import altered_part, altered_whole
from pronghorn.engine.angles import Angles, angles_of
from pronghorn.engine.binding import Binding, base_causal_lm
from pronghorn.engine.delta import delta_heads
from pronghorn.engine.experts import (
    STACKS,
    adapters_of_router,
    adapters_of_stack,
    innermost,
    read_router,
    read_router_bias,
)
from pronghorn.engine.layer_call import compute_dtype
from pronghorn.engine.read import (
    Reading,
    active_module,
    group_names,
    read_norm,
    read_norm_before,
    read_projection,
)
from pronghorn.errors import EngineRefused
from pronghorn.families import DELTA, KV_UP, Q_UP, LayerParts
from pronghorn.inference.latent import LatentHeads
from pronghorn.inference.mixture import ExpertStack, ExpertTable, GatedMlp, Mixture, SharedExpert
from pronghorn.inference.projections import Group
from pronghorn.inference.recurrent import DeltaNet
from pronghorn.inference.watching import Watch, look_at
from pronghorn.kernels.decode_attention import Heads, Rotation
from pronghorn.kernels.delta_step import DeltaWeights
from pronghorn.kernels.dispatch import math_dtype
from pronghorn.kernels.gated_output import gated_output_forward
from pronghorn.weights.experts import read_experts

#: kinds of rotation whose angles depend on a position alone, not on how long the context is
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn", "proportional")
#: one set of angles for short contexts, another for long ones
LONGROPE = "longrope"
#: frequencies that shrink with every token beyond the original length
DYNAMIC = "dynamic"


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `rotation` is a key of `Decoder.rotations`; without an `mlp_norm` the MLP reads what q, k and
    v read. `head_norms`: of q and k, where the rotation does not take them in. `gated`: q comes with a gate of the
    attention's output, head by head."""

    norm: Norm | NoNorm
    qkv: Group
    heads: Heads | LatentHeads | DeltaNet
    rotation: str | None
    o: Group
    mlp_norm: Norm | NoNorm | None
    mlp: GatedMlp | Mixture
    attention_output_norm: Norm | None = None
    mlp_output_norm: Norm | None = None
    head_norms: tuple[Norm, Norm] | None = None
    gated: bool = False

    def apart(self, projected: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, (N + 2 K) D] as attention takes it, and the gate [T, N, D] where there is one, of what `qkv` gives."""
        heads = self.heads
        if not self.gated or not isinstance(heads, Heads):
            return self.norm_heads_(projected), None
        many = heads.heads * heads.head_dim
        q, gate = projected[:, : 2 * many].view(len(projected), heads.heads, -1).chunk(2, 2)
        qkv = torch.cat([q.reshape(-1, many), projected[:, 2 * many :]], 1)
        return self.norm_heads_(qkv), gate.contiguous()

    def opened(self, out: Tensor, gate: Tensor | None) -> Tensor:
        """What the gate leaves of the attention's output [T, N·D]."""
        return out if gate is None else gated_output_forward(out.view_as(gate), gate).flatten(1)

    def norm_heads_(self, qkv: Tensor) -> Tensor:
        """qkv [T, (N + 2 K) D] with `head_norms` of q and k, in place."""
        heads = self.heads
        if self.head_norms is not None and isinstance(heads, Heads):
            counts = heads.heads, heads.kv_heads, heads.kv_heads
            parts = qkv.view(len(qkv), -1, heads.head_dim).split(counts, 1)
            for part, norm in zip(parts, self.head_norms, strict=False):
                part.copy_(norm.of_heads(part))
        return qkv

    @property
    def groups(self) -> tuple[Group, ...]:
        """All that rows are multiplied by, experts apart."""
        inner = () if isinstance(self.heads, Heads) else self.heads.groups
        return self.qkv, *inner, self.o, *self.mlp.groups

    @property
    def expert_tables(self) -> list[ExpertTable]:
        """Adapters of experts."""
        return self.mlp.tables if isinstance(self.mlp, Mixture) else []


class Decoder:
    """What `Engine` runs.

    Args:
        model: a Transformers causal LM or a PEFT model of one; it is bound where it is not yet.
        positions: how many positions the tables of angles hold.

    Attributes:
        adapters: names of the adapters that requests may choose.
        active: the one that the model itself runs now, None for none.
        only_active: adapters bring more than pairs on linear modules: requests have to name the active one.

    Raises:
        EngineRefused: only Transformers' own code can run this model.
    """

    def __init__(self, model: Any, positions: int) -> None:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise _refused("its adapter is virtual tokens in front of a prompt")
        self.base = base_causal_lm(model)
        self.binding: Binding = bind(self.base)
        if not self.binding.bound:
            raise _refused("; ".join(self.binding.reasons))
        self.positions = positions
        self.embedding = self.base.get_input_embeddings()
        self.device: torch.device = self.base.lm_head.weight.device
        self.residual_dtype: torch.dtype = active_module(self.embedding).weight.dtype
        self.dtype = compute_dtype(
            self.binding, torch.empty(0, dtype=self.residual_dtype, device=self.device)
        )
        self.scales = self.binding.scales
        self.activation = self.binding.activation
        self.vocabulary = int(self.base.lm_head.weight.shape[0])
        self._watch: Watch | None = None
        #: contexts of more tokens have other angles, of all positions; None where they never do
        self.switch = _switch(self.binding, positions)
        self.rotations: dict[str | None, Rotation] = {}
        self._rotated_by: object = None
        self.refresh()

    def refresh(self) -> bool:
        """Read the model again if its weights, adapters or switches are other ones than before; True if so.

        Raises:
            EngineRefused: it has become one that only Transformers' own code can run.
        """
        if self._watch is not None and not self._watch.changed():
            return False
        self._watch = None  # a reading that fails is no reading
        refusal = why_not(self.binding, self.positions)
        if refusal is not None:
            raise _refused(refusal)
        tuners = [m for m in self.base.modules() if "base_layer" in m._modules]
        self.merged = any(bool(getattr(m, "merged", False)) for m in tuners)
        self.only_active = brings_modules(self.base)
        on = {tuple(m.active_adapters) for m in tuners if not m.disable_adapters}
        self.several_active = any(len(names) > 1 for names in on) or len(on) > 1
        self.active = next(iter(on))[0] if on and not self.merged and not self.several_active else None
        names = {name for m in tuners if "lora_A" in m._modules for name in m._modules["lora_A"]._modules}
        self.adapters = () if self.merged else tuple(sorted(names))
        if self.only_active:  # some have no pairs at all
            self.adapters = () if self.active is None else (self.active,)
        self.layers = [self._layer(layer) for layer in self.binding.layers]
        #: whether sequences need a slot for states (`inference.recurrent`)
        self.recurrent = any(isinstance(layer.heads, DeltaNet) for layer in self.layers)
        #: whether any adapter is on experts
        self.adapts_experts = any(layer.expert_tables for layer in self.layers)
        self.norm = read_norm(self.binding.decoder.norm, self.binding.family.norm_offset)
        self.head = self._group([self.base.lm_head], self.residual_dtype)
        self._refresh_rotations()
        # Taken now: weights of a group may have moved next to each other.
        self._watch = Watch(self.base)
        return True

    def places(self) -> list[int]:
        """Where the parameters and buffers lie, adapters' apart."""
        held = [p for name, p in self.base.named_parameters() if ".lora_" not in name]
        return [tensor.data_ptr() for tensor in (*held, *self.base.buffers())]

    def embed(self, ids: Tensor) -> Tensor:
        """[T] -> [T, H], as the decoder takes them."""
        return self.scaled(self.embedding(ids))

    def scaled(self, x: Tensor) -> Tensor:
        """Rows of the embedding as the first layer takes them."""
        return x if self.scales.embedding == 1.0 else x * self.scales.embedding

    def attention_backend(self, dtype: torch.dtype, head_dim: int, windowed: bool) -> str:
        """What attends over prompts."""
        binding = self.binding
        backend = binding.attention_backend(self.device, dtype, head_dim, window=windowed)
        if backend == "cudnn" and binding.attention is None:
            return "flash"  # cuDNN builds a plan for every rough size, up to a second each: prompts vary
        return backend

    def slot(self, adapter: str | None) -> int:
        """An adapter's number in tables of all, 0 for none."""
        return 0 if adapter is None else 1 + self.adapters.index(adapter)

    def _layer(self, layer: Any) -> Layer:
        binding, family = self.binding, self.binding.family
        parts, config, index = family.parts.of(layer), binding.config, binding.layer_index(layer)
        attention, mlp = getattr(layer, parts.attention), family.mlp(config, index)
        named = group_names(parts, mlp, family.mixture)
        if DELTA in named:
            # In two, of one or two projections: launches of few rows take no more than three.
            path, names = named.pop(DELTA)
            half = len(names) // 2
            named |= {0: (path, names[:half]), DELTA: (path, names[half:])}
        groups = {
            slot: self._group([getattr(layer.get_submodule(path), name) for name in names], self.dtype)
            for slot, (path, names) in named.items()
        }

        def norm(parent: Any, name: str | None) -> Norm | None:
            return None if name is None else read_norm(getattr(parent, name), family.norm_offset)

        q_norm, k_norm = norm(attention, parts.q_norm), norm(attention, parts.k_norm)
        head_norms = None
        if q_norm is not None and k_norm is not None and not q_norm.is_of_a_head(attention.head_dim):
            head_norms, q_norm, k_norm = (q_norm, k_norm), None, None
        heads: Heads | LatentHeads | DeltaNet
        if parts.delta is not None:
            heads = self._delta_net(attention, parts, groups)
        elif parts.latent is not None:
            heads = self._latent(attention, groups)
        else:
            heads = self._heads(attention, index, q_norm, k_norm)
        return Layer(
            norm=read_norm_before(layer, parts.input_norm, family.norm_offset),
            qkv=groups[0],
            heads=heads,
            rotation=family.rotation(config, index),
            o=groups[3],
            mlp_norm=None
            if parts.side_by_side
            else read_norm_before(layer, parts.mlp_norm, family.norm_offset),
            mlp=GatedMlp(groups[4], groups[6]) if mlp == "glu" else self._mixture(layer, groups),
            attention_output_norm=norm(layer, parts.attention_output_norm),
            mlp_output_norm=norm(layer, parts.mlp_output_norm),
            head_norms=head_norms,
            gated=parts.gated,
        )

    def _heads(self, attention: Any, index: int, q_norm: Norm | None, k_norm: Norm | None) -> Heads:
        family, config = self.binding.family, self.binding.config
        parts = family.parts
        return Heads(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            scale=float(attention.scaling),
            window=family.window(config, index),
            q_norm=None if q_norm is None else q_norm.weight.detach(),
            k_norm=None if k_norm is None else k_norm.weight.detach(),
            eps=1e-6 if q_norm is None else q_norm.eps,
            norm_offset=family.norm_offset,
            softcap=self.scales.attention_softcap,
            sinks=None if parts.sinks is None else attention._parameters[parts.sinks].detach(),
        )

    def _latent(self, attention: Any, groups: dict[int, Group]) -> LatentHeads:
        family = self.binding.family
        names = family.parts.latent
        assert names is not None
        if groups[KV_UP].stacked_bias is not None:
            raise _refused(f"{names.kv_up} has a bias")
        for name, share in groups[KV_UP].shares.items():
            if any(bias is not None for _, _, _, bias in share.parts):
                raise _refused(f"adapter '{name}' has a bias on {names.kv_up}")
        q_norm = names.q_norm
        return LatentHeads(
            heads=self.binding.config.num_attention_heads,
            nope=attention.qk_nope_head_dim,
            rope=attention.qk_rope_head_dim,
            scale=float(attention.scaling),
            pairs=names.pairs,
            q_norm=None if q_norm is None else read_norm(getattr(attention, q_norm), family.norm_offset),
            q_up=groups.get(Q_UP),
            kv_norm=read_norm(getattr(attention, names.kv_norm), family.norm_offset),
            kv_up=groups[KV_UP],
        )

    def _delta_net(self, attention: Any, parts: LayerParts, groups: dict[int, Group]) -> DeltaNet:
        names = parts.delta
        assert names is not None
        conv: Any = active_module(getattr(attention, names.conv))
        heads = delta_heads(attention, names)
        norm = read_norm(getattr(attention, names.norm), 0.0)  # which no family multiplies by 1 + w
        decay, dt_bias = (attention._parameters[name].detach() for name in (names.decay, names.dt_bias))
        return DeltaNet(
            heads=heads,
            gates=groups[DELTA],
            conv=conv.weight.detach()[:, 0],
            conv_bias=None if conv.bias is None else conv.bias.detach(),
            weights=DeltaWeights(decay, dt_bias, norm.weight.detach(), norm.eps),
            columns=DeltaNet.columns_of(heads, self.device),
        )

    def _mixture(self, layer: Any, groups: dict[int, Group]) -> Mixture:
        family, config = self.binding.family, self.binding.config
        parts = family.mixture
        assert parts is not None
        mlp = getattr(layer, family.parts.mlp)
        router, experts = getattr(mlp, parts.router), getattr(mlp, parts.experts)
        base, scoring = innermost(experts), parts.scoring(config)
        stacks = []
        for name in STACKS:
            weight = read_experts(base, name, parts.transposed)
            table = ExpertTable.of(
                adapters_of_stack(experts, name, weight.shape[0]), self.adapters, self.dtype
            )
            stacks.append(ExpertStack(weight, base._parameters.get(f"{name}_bias"), table))
        read = read_router(router)
        on_router = adapters_of_router(router)
        return Mixture(
            router=Group(
                [LinearProjection(read.weight, read.bias)],
                {name: {0: on_router[name]} for name in self.adapters if name in on_router},
                math_dtype(self.dtype) if scoring.wide_logits else self.dtype,
            ),
            scoring=scoring,
            router_bias=read_router_bias(router, parts.router_bias),
            gate_up=stacks[0],
            down=stacks[1],
            gating=parts.gating(base, self.activation),
            activation=self.activation,
            shared=None
            if parts.shared is None
            else SharedExpert(GatedMlp(groups[4], groups[6]), groups.get(7)),
        )

    def _group(self, modules: Sequence[nn.Module], dtype: torch.dtype) -> Group:
        projections = []
        adapters: dict[str, dict[int, Adapter]] = {name: {} for name in self.adapters}
        for i, module in enumerate(map(active_module, modules)):
            read = read_projection(module, Reading(False), 0)
            if not isinstance(read, LinearProjection):
                raise _refused(read.reason)
            projections.append(LinearProjection(read.weight, read.bias))
            for name, adapter in _adapters(module):
                if name in adapters:
                    adapters[name][i] = adapter
        return Group(projections, adapters, dtype)

    def _refresh_rotations(self) -> None:
        """Make the angles where the module that gives them is another one, or has other frequencies; where they lie
        stays, since recorded steps read them."""
        rotary = self.binding.decoder.rotary_emb
        by = look_at([rotary])
        if self.rotations and by == self._rotated_by:
            return
        found = self._rotations()
        for kind, new in found.items():
            if kind in self.rotations:
                old = self.rotations[kind]
                old.cos.copy_(new.cos)
                old.sin.copy_(new.sin)
        self.rotations = self.rotations or found
        self._rotated_by = look_at([rotary])

    def _rotations(self) -> dict[str | None, Rotation]:
        pairs = self.binding.family.turns == "pairs"
        if self.switch is None:
            # A dynamic module keeps the frequencies of the longest context it has seen until it sees a short one.
            self._angles(1)
            angles = self._angles(self.positions)
            return {
                kind: Rotation(cos.contiguous(), sin.contiguous(), pairs=pairs)
                for kind, (cos, sin) in angles.items()
            }
        found: dict[str | None, Rotation] = {}
        short, long = self._angles(self.switch), self._angles(self.positions)
        for kind in short:
            cos, sin = (torch.cat(pair) for pair in zip(short[kind], long[kind], strict=True))
            found[kind] = Rotation(cos, sin, self.switch, pairs)
        return found

    def _angles(self, positions: int) -> Angles:
        """Of the positions before this one, in a context of so many tokens."""
        like = torch.empty(1, 1, dtype=self.residual_dtype, device=self.device)
        numbers = torch.arange(positions, device=self.device)
        return angles_of(self.binding, self.binding.decoder, like, numbers)


def why_not(binding: Binding, positions: int) -> str | None:
    """Why only Transformers' own code can run a bound model in contexts of so many tokens; None where it need not."""
    config, family = binding.config, binding.family
    altered = altered_whole(binding.model, binding.decoder)
    altered = altered or altered_part(binding.decoder, family.parts, family.mixture)
    if altered is not None:
        return altered
    growth = binding.scales.query_growth
    if growth is not None and positions > growth[1]:
        return f"its queries grow beyond {growth[1]:,} tokens, and max_context is {positions:,}"
    return _moving_rotation(
        getattr(config, "rope_parameters", None) or {}, positions, config.max_position_embeddings
    )


def brings_modules(model: nn.Module) -> bool:
    """Whether adapters change more than linear products: modules of their own, trained tokens, an adapted embedding.

    Those modules run as they are, with the adapter that is active on them, whatever a request names.
    """
    return any(
        "modules_to_save" in module._modules
        or "token_adapter" in module._modules
        or "trainable_tokens_delta" in module._modules
        or len(module._modules.get("lora_embedding_A") or ()) > 0  # type: ignore[arg-type]
        for module in model.modules()
    )


def _moving_rotation(parameters: Any, positions: int, original: int) -> str | None:
    """A kind of rotation whose angles change with every length of the context up to `positions`, or None; dynamic
    NTK's stay as they are up to the original length."""
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    for found in nested or [parameters]:
        kind = found.get("rope_type", "default")
        if kind == DYNAMIC and positions > original:
            return (
                f"its angles change with the context's length beyond {original:,} tokens (rope_type '{kind}')"
            )
        if kind not in (*_FIXED_ROTATIONS, DYNAMIC) and (nested or kind != LONGROPE):
            return f"its angles depend on the context's length (rope_type '{kind}')"
    return None


def _switch(binding: Binding, positions: int) -> int | None:
    """The most tokens of a context with LongRoPE's short factors, where contexts of so many positions can have more."""
    if getattr(binding.decoder.rotary_emb, "rope_type", None) != LONGROPE:
        return None
    longest = int(binding.config.rope_parameters["original_max_position_embeddings"])
    return longest if positions > longest else None


def _adapters(module: Any) -> Iterator[tuple[str, Adapter]]:
    """The LoRA pairs of a linear module by name, active or not."""
    children = module._modules
    if "base_layer" not in children or "lora_A" not in children:
        return
    for name, a in children["lora_A"]._modules.items():
        b = children["lora_B"]._modules.get(name)
        if name in module.lora_variant or not (isinstance(a, nn.Linear) and isinstance(b, nn.Linear)):
            raise _refused(f"adapter '{name}' is of a kind that PEFT computes itself")
        yield name, Adapter(a.weight, b.weight, float(module.scaling[name]), b_bias=b.bias)


def _refused(reason: str) -> EngineRefused:
    return EngineRefused(
        f"the engine cannot run this model: {reason}", fix="Transformers' model.generate can"
    )
