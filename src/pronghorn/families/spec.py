"""How a model family is described: which submodule plays which part, and the few numbers that differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from pronghorn.families.mixture import MixtureParts

#: what of a head turns together: element i with the one half the rotated width away, or neighbours
Turns = Literal["halves", "pairs"]

#: slots of the projections that read codes
Q_UP, KV_UP = 8, 9
#: slot of the first of those that a recurrence's layer reads its input with
DELTA = 10


@dataclass(frozen=True)
class LatentParts:
    """Paths inside the attention of layers with latent attention (`blocks.latent_attention`).

    `q` reads the layer's input; it gives q, or with `q_norm` and `q_up` a code of it, which these make q of. `pairs`:
    neighbouring elements are rotated together, not halves.
    """

    q: str = "q_a_proj"
    q_norm: str | None = "q_a_layernorm"
    q_up: str | None = "q_b_proj"
    kv: str = "kv_a_proj_with_mqa"
    kv_norm: str = "kv_a_layernorm"
    kv_up: str = "kv_b_proj"
    pairs: bool = True


@dataclass(frozen=True)
class DeltaParts:
    """Names inside the linear attention of layers with the gated delta rule (`blocks.delta_net`).

    `inputs` read the layer's input: [q | k | v], z, b and a; or where there are two of them [q | k | v | z] and
    [b | a], one head of k after the other.
    """

    inputs: tuple[str, ...] = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    conv: str = "conv1d"
    norm: str = "norm"
    decay: str = "A_log"
    dt_bias: str = "dt_bias"


@dataclass(frozen=True)
class LayerParts:
    """Paths inside a decoder layer. A part that a family lacks is None.

    `qkv` and `gate_up` are one module for what others have apart; q, k, v or gate, up are then not looked at. So are q,
    k, v and their norms where the attention is `latent` or a recurrence, the gated `delta` rule. `recurrent` are the
    parts of layers with such a recurrence, where a family has both kinds.
    """

    input_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    qkv: str | None = None
    o: str = "o_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    #: these have a weight for every element of all heads, not for those of one
    norms_of_all_heads: bool = False
    #: a logit per head in the softmax's denominator
    sinks: str | None = None
    latent: LatentParts | None = None
    delta: DeltaParts | None = None
    #: q gives a gate of each head's output besides
    gated: bool = False
    recurrent: LayerParts | None = None
    #: of what the attention gives, before the residual sum
    attention_output_norm: str | None = None
    #: of the residual sum, before the MLP; None where there is none, as in front of the attention, and where the MLP
    #: reads what the attention reads (`side_by_side`)
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    gate_up: str | None = None
    down: str = "down_proj"
    activation: str = "act_fn"
    #: of what the MLP gives, before the residual sum
    mlp_output_norm: str | None = None

    @property
    def side_by_side(self) -> bool:
        """Whether attention and MLP read the same norm, one beside the other."""
        return self.mlp_norm is None and self.input_norm is not None

    @property
    def kinds(self) -> tuple[LayerParts, ...]:
        """The parts of each kind of layer that there may be."""
        return (self,) if self.recurrent is None else (self, self.recurrent)

    def of(self, layer: Any) -> LayerParts:
        """The parts of one layer, by the attention that it has."""
        other = self.recurrent
        return other if other is not None and other.attention in layer._modules else self

    @cached_property
    def attention_projections(self) -> dict[int, tuple[str, ...]]:
        """Names of the attention's modules with the same input, by the slot of the first (`engine.read.group_names`):
        those that read the layer's input, the one that reads the attention's output, those that read codes."""
        if self.delta is not None:
            return {DELTA: self.delta.inputs, 3: (self.o,)}
        if self.latent is None:
            return {0: (self.q, self.k, self.v) if self.qkv is None else (self.qkv,), 3: (self.o,)}
        latent = self.latent
        of_q = {} if latent.q_up is None else {Q_UP: (latent.q_up,)}
        return {0: (latent.q, latent.kv), 3: (self.o,), **of_q, KV_UP: (latent.kv_up,)}

    @cached_property
    def attention_norms(self) -> tuple[str, ...]:
        """Names of the norms inside the attention."""
        if self.delta is not None:
            return (self.delta.norm,)
        latent = self.latent
        found = (self.q_norm, self.k_norm) if latent is None else (latent.q_norm, latent.kv_norm)
        return tuple(name for name in found if name is not None)

    @cached_property
    def by_usual_name(self) -> dict[str, tuple[str, ...]]:
        """What stands here for a projection that most families have: q_proj, k_proj, v_proj, gate_proj, up_proj."""
        held: dict[str, tuple[str, ...]] = {}
        if self.qkv is not None:
            held |= dict.fromkeys((self.q, self.k, self.v), (self.qkv,))
        if self.gate_up is not None:
            held |= dict.fromkeys((self.gate, self.up), (self.gate_up,))
        if self.latent is not None:
            latent = self.latent
            held |= {} if latent.q_up is None else {self.q: (latent.q, latent.q_up)}
            held |= dict.fromkeys((self.k, self.v), (latent.kv, latent.kv_up))
        if self.recurrent is not None and self.recurrent.delta is not None:
            inputs, other = self.recurrent.delta.inputs, self.recurrent
            held |= {name: (name, inputs[0]) for name in (self.q, self.k, self.v)}
            held[self.o] = (self.o, other.o)
        return held

    @cached_property
    def mlp_projections(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the modules that read the MLP's input, and of the one that reads the activation."""
        return ((self.gate, self.up) if self.gate_up is None else (self.gate_up,)), (self.down,)

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms of a layer, in the order of their use."""
        found = (self.input_norm, self.attention_output_norm, self.mlp_norm, self.mlp_output_norm)
        return tuple(name for name in found if name is not None)


@dataclass(frozen=True)
class Scales:
    """Numbers that a config sets besides sizes; the defaults change nothing.

    Args:
        embedding: factor of the embedded tokens, where the decoder and not its embedding multiplies.
        residual: factor of what attention and MLP give, before the residual sum.
        logits: factor of the logits. `logit_softcap`: logits become c · tanh(logits / c) after it.
        attention_softcap: the same for the attention's logits.
        query_growth: (β, length): rotated queries are multiplied by 1 + β ln(1 + ⌊position / length⌋).
    """

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    logit_softcap: float | None = None
    attention_softcap: float | None = None
    query_growth: tuple[float, int] | None = None


def no_window(config: Any, layer_index: int) -> int | None:
    """Full causal attention in every layer."""
    return None


def window_by_layer_type(config: Any, layer_index: int) -> int | None:
    """A sliding window in the layers that `layer_types` says have one."""
    layer_types = getattr(config, "layer_types", None)
    sliding = layer_types is not None and layer_types[layer_index] == "sliding_attention"
    return config.sliding_window if sliding else None


def window_everywhere(config: Any, layer_index: int) -> int | None:
    """A sliding window in every layer, where the config sets one."""
    return getattr(config, "sliding_window", None)


def no_restriction(config: Any) -> str | None:
    """Every config of the family takes the fast path."""
    return None


def no_scales(config: Any) -> Scales:
    """Nothing is multiplied or capped."""
    return Scales()


#: `DecoderFamily.rotation` of layers whose angles the decoder's rotary module gives without being told a kind
ONE_ROTATION = ""


def one_rotation(config: Any, layer_index: int) -> str | None:
    """The same angles in every layer."""
    return ONE_ROTATION


def rotation_by_layer_type(config: Any, layer_index: int) -> str:
    """Angles of their own for layers with a window."""
    return str(config.layer_types[layer_index])


def gated_mlp(config: Any, layer_index: int) -> str:
    """gate, up and down in every layer."""
    return "glu"


@dataclass(frozen=True)
class DecoderFamily:
    """A decoder of residual layers with norms, rotary attention and a gated MLP.

    Args:
        name: shown by `describe()`.
        model_types: `config.model_type` values it covers.
        prefix: Transformers' class prefix; the classes that the fast path was reviewed for are
            `{prefix}ForCausalLM`, `{prefix}Model`, `{prefix}DecoderLayer`, `{prefix}Attention`, `{prefix}MLP`,
            `{prefix}RMSNorm` (or `{prefix}LayerNorm`, which takes off the mean) and `{prefix}RotaryEmbedding`.
        decoder: the class of the decoder where it is not `{prefix}Model`. rotary: of its angles where it is not
            `{prefix}RotaryEmbedding`.
        causal_lm: the class of the whole model where it is not `{prefix}ForCausalLM`.
        mlp_class: the class of a layer's MLP where it is not `{prefix}MLP`.
        path: where the decoder is in the whole model; between them may stand a module that puts images among tokens.
        image_blocks: tokens of an image see one another both ways.
        parts: where things are in a layer. `parts_of`: the same by config, where that decides it.
        mlp: by config and layer which kind of MLP a layer has, a key of `engine.forward.MLP_BLOCKS`.
        mixture: where things are in its layers with a mixture of experts, where it has such.
        window: sliding window in tokens of a layer, None for full attention.
        rotation: by config and layer what the rotary module is asked for: `ONE_ROTATION`, the name of one of several
            kinds of layers, or None for a layer that does not rotate.
        turns: what of a head its angles turn together. `angles`: how the rotary module repeats each angle: for the
            other half, or beside itself.
        scales: factors and caps that the config sets.
        norm_offset: 1.0 where norms multiply by (1 + weight).
        activation: the config's key for the MLP's activation.
        unsupported: a reason why a config of this family cannot take the fast path, or None.
    """

    name: str
    model_types: tuple[str, ...]
    prefix: str
    decoder: str = ""
    rotary: str = ""
    causal_lm: str = ""
    mlp_class: str = ""
    path: str = "model"
    image_blocks: bool = False
    parts: LayerParts = field(default_factory=LayerParts)
    parts_of: Callable[[Any], LayerParts] | None = None
    mlp: Callable[[Any, int], str] = gated_mlp
    mixture: MixtureParts | None = None
    window: Callable[[Any, int], int | None] = no_window
    rotation: Callable[[Any, int], str | None] = one_rotation
    turns: Turns = "halves"
    angles: Turns = "halves"
    scales: Callable[[Any], Scales] = no_scales
    norm_offset: float = 0.0
    activation: str = "hidden_act"
    unsupported: Callable[[Any], str | None] = no_restriction

    def for_config(self, config: Any) -> DecoderFamily:
        """The family with the `parts` of a config's models."""
        return self if self.parts_of is None else replace(self, parts=self.parts_of(config))

    @property
    def reads_images(self) -> bool:
        """Whether the decoder is the text part of a model for images and text."""
        return self.path != "model"


#: a config's name of its activation -> the activation's name in `kernels.glu`
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
