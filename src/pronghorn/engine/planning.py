"""From a model, or its config alone, to the sizes that a memory plan needs; and the plan onto the model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from pronghorn.blocks import (
    Level,
    LinearProjection,
    gated_products,
    host_bytes_per_token,
    kept_bytes_per_token,
    parks,
)
from pronghorn.engine.binding import Binding, host_pool
from pronghorn.engine.experts import read_mixture, stack_ranks
from pronghorn.engine.layer_facts import adapted_products, keeps_rows_together, lies_joined
from pronghorn.engine.read import Reading
from pronghorn.engine.tower_memory import vision_bytes
from pronghorn.errors import BudgetTooSmall, UnsupportedCheckpoint
from pronghorn.families import DELTA, KV_UP, MOE, Q_UP, family_of
from pronghorn.hardware import gpu_memory
from pronghorn.kernels.tiles import PROCESSORS
from pronghorn.memory import (
    HOST_SHARE,
    PROJECTIONS,
    Batch,
    DeltaShape,
    LatentShape,
    MixtureShape,
    ModelShape,
    Plan,
    Rates,
    available_host_bytes,
    parse_budget,
    plan,
    plan_if_it_fits,
    rates_of,
    with_margin,
    without_margin,
)
from pronghorn.memory.pool import LARGEST_CHUNK
from pronghorn.memory.storages import STORAGES, stored_tensors
from pronghorn.weights import DenseWeight, FourBitWeight, is_four_bit, keep_expanded
from pronghorn.weights.experts import DenseExperts, ExpertWeight, FourBitExperts

logger = logging.getLogger("pronghorn")

#: types whose configs do not say that q, k and v have biases
_ALWAYS_BIASED = ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")
#: sizes that a config must have above 0; many GPUs' memory would not hold a model with one beyond 2^24
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
)  # fmt: skip


def shape_of_config(
    config: Any,
    *,
    rank: int = 16,
    ranks: Mapping[str, int] | None = None,
    storage: str = "bfloat16",
    dtype: str = "bfloat16",
    attention: str = "flash",
    **more: Any,
) -> ModelShape:
    """Sizes from a Transformers config; adapters of one rank on all linear layers unless `ranks` says otherwise.

    Of a model that reads images they are those of its language model.

    Raises:
        UnsupportedCheckpoint: for an architecture that is not planned: its memory is not this engine's.
    """
    config = text_config(config)
    found = family_of(config.model_type)
    if found is None:
        raise UnsupportedCheckpoint(
            f"memory is planned for model types that take the fast path, and '{config.model_type}' does not",
            fix="train it without a budget: it runs Transformers' own forward",
        )
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    wrong = [name for name, size in sizes.items() if size is not None and not 0 < size < 1 << 24]
    if wrong:
        what = f"a model with {wrong[0]} {sizes[wrong[0]]} is none"
        raise UnsupportedCheckpoint(what, fix="correct its config.json")
    family, heads = found.for_config(config), config.num_attention_heads
    scales, latent, delta = family.scales(config), latent_shape(config), delta_shape(config)
    rotations = {family.rotation(config, index) for index in range(config.num_hidden_layers)}
    fused, fused_gate_up = family.parts.qkv is not None, family.parts.gate_up is not None
    if ranks is None:
        of_heads = PROJECTIONS[:3] if latent is None else ("q", "kv", *latent.raised)
        of_heads = ("q",) if fused else of_heads
        names = (*of_heads, "o", "gate", *(() if fused_gate_up else ("up",)), "down")
        names += () if delta is None else delta.names
        ranks = dict.fromkeys(names, rank)
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=heads if latent is not None else getattr(config, "num_key_value_heads", None) or heads,
        head_dim=(getattr(config, "head_dim", None) or config.hidden_size // heads)
        if latent is None
        else latent.nope + latent.rope,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        ranks=ranks,
        storage=storage,
        dtype=dtype,
        residual_element=2 if dtype != "float32" else 4,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        qk_norm=family.parts.q_norm is not None,
        norms_of_all_heads=family.parts.norms_of_all_heads,
        qkv_bias=any(getattr(config, name, False) for name in ("attention_bias", "qkv_bias"))
        or config.model_type in _ALWAYS_BIASED,
        fused=fused,
        fused_gate_up=fused_gate_up,
        output_norms=family.parts.mlp_output_norm is not None,
        scaled_branches=scales.residual != 1.0,
        parallel=family.parts.side_by_side,
        pre_norms=family.parts.input_norm is not None,
        rotations=len(rotations),
        wide_heads=storage.endswith("in int8 products"),
        attention="flex" if attention == "flash" and scales.attention_softcap else attention,
        mixture=mixture_shape(config, ranks),
        dense_layers=_dense_layers(config),
        latent=latent,
        delta=delta,
        gated=family.parts.gated,
        **more,
    )


def text_config(config: Any) -> Any:
    """The language model's part of a config, with what the whole says of the head; the config itself where it has no
    parts."""
    text = config.get_text_config()
    if text is config:
        return config
    text = copy.copy(text)
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    return text


def latent_shape(config: Any) -> LatentShape | None:
    """The latent attention of a config, or None."""
    family = family_of(config.model_type)
    assert family is not None
    parts = family.for_config(config).parts.latent
    if parts is None:
        return None
    return LatentShape(
        q_code=0 if parts.q_up is None else config.q_lora_rank,
        kv_code=config.kv_lora_rank,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        value=config.v_head_dim,
    )


def delta_shape(config: Any) -> DeltaShape | None:
    """The layers of a config whose attention is the gated delta rule, or None."""
    family = family_of(config.model_type)
    assert family is not None
    parts = family.parts.recurrent
    if parts is None or parts.delta is None:
        return None
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    of_keys, wide = 2 * keys * config.linear_key_head_dim, values * config.linear_value_head_dim
    by_keys = len(parts.delta.inputs) == 2
    return DeltaShape(
        tuple(kind == "linear_attention" for kind in config.layer_types),
        {"qkvz": of_keys + 2 * wide, "ba": 2 * values}
        if by_keys
        else {"qkv": of_keys + wide, "z": wide, "b": values, "a": values},
        keys,
        config.linear_key_head_dim,
        values,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
    )


def _dense_layers(config: Any) -> int:
    """How many layers of a config with mixtures have none."""
    family = family_of(config.model_type)
    assert family is not None
    if family.mixture is None:
        return 0
    return sum(family.mlp(config, index) != MOE for index in range(config.num_hidden_layers))


def mixture_shape(config: Any, ranks: Mapping[str, int]) -> MixtureShape | None:
    """The mixture that most layers of a config are, or None; ranks of the stacks stand under gate and down."""
    family, count = family_of(config.model_type), config.num_hidden_layers
    assert family is not None
    parts = family.mixture
    if parts is None or 2 * sum(family.mlp(config, index) == MOE for index in range(count)) <= count:
        return None
    scoring, shared = parts.scoring(config), parts.shared_intermediate
    return MixtureShape(
        scoring.experts,
        scoring.top_k,
        getattr(config, parts.intermediate),
        0 if shared is None else shared(config),
        {"gate_up": ranks.get("gate", 0), "down": ranks.get("down", 0)},
        scoring.wide_logits,
    )


def shape_of(binding: Binding, **more: Any) -> ModelShape:
    """Sizes of a bound model, read from its modules."""
    embedding = binding.model.get_input_embeddings().weight
    dtype = binding.weight_dtype or embedding.dtype
    mixtures = [layer for layer in binding.layers if binding.mlp_of(layer) == MOE]
    parts = binding.family.parts
    usual = [layer for layer in mixtures or binding.layers if parts.of(layer) is parts]
    layer = usual[0 if mixtures else len(usual) // 2]
    groups = binding.groups(layer, Reading(True))
    names = dict(enumerate(PROJECTIONS))
    if parts.latent is not None:
        names |= {1: "kv", Q_UP: "q_up", KV_UP: "kv_up"}
    ranks = _ranks(groups, names)
    recurrent = next((layer for layer in binding.layers if parts.of(layer) is not parts), None)
    if recurrent is not None:
        delta = delta_shape(binding.config)
        assert delta is not None
        names = {**{DELTA + i: name for i, name in enumerate(delta.inputs)}, 3: delta.output}
        ranks |= _ranks(binding.groups(recurrent, Reading(True)), names)
    if mixtures:
        ranks |= stack_ranks(layer, binding.family)
    read = [binding.groups(layer, Reading(True)) for layer in binding.layers]
    storages = tuple(_storage((found.get(4) or found.get(0) or found[DELTA])[0], dtype) for found in read)
    linear_tensors = _mixed_tensors(read)
    stored = max(set(storages), key=storages.count)
    return shape_of_config(
        binding.model.config,
        ranks=ranks,
        storage=stored,
        layer_storages=storages if len(set(storages)) > 1 and not linear_tensors else (),
        linear_tensors=linear_tensors,
        stack_tensors=_mixed_stacks(read_mixture(binding.family, binding.config, mixtures).weights),
        dtype=_name(dtype),
        attention=binding.attention_backend(embedding.device, dtype, binding.head_dim),
        trained="adapters" if any(ranks.values()) else "all",
        joined=all(lies_joined(found, embedding.device, binding.laid_out) for found in read),
        elsewhere=bool(binding.elsewhere),
        rows_go_apart=not any(map(keeps_rows_together, read)),
        unit_in_products=all(gated_products.suits_block(found, embedding.device, dtype) for found in read),
        processors=_processors(embedding.device),
        **adapted_products(read, embedding.device, dtype),
        **more,
    )


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _mixed_stacks(stacks: Sequence[ExpertWeight]) -> tuple[int, ...]:
    """Bytes of every tensor of stacks of experts, where some are in 4 bits and others are not, or in blocks of another
    size than 64; () where `storage` says it all."""
    four_bit = [stack.packed for stack in stacks if isinstance(stack, FourBitExperts)]
    dense = [stack for stack in stacks if isinstance(stack, DenseExperts)]
    if not four_bit or (not dense and all(weight.state.blocksize == 64 for weight in four_bit)):
        return ()
    return (*(n for weight in four_bit for n in weight.stored_bytes), *(s.weight.nbytes for s in dense))


def _ranks(groups: Mapping[int, Sequence[Any]], names: Mapping[int, str]) -> dict[str, int]:
    """Summed ranks of the adapters on each projection of a layer that has a name, by its slot."""
    return {
        names[slot + i]: sum(adapter.rank for adapter in projection.adapters)
        for slot, found in groups.items()
        if slot in names
        for i, projection in enumerate(found)
        if isinstance(projection, LinearProjection)
    }


def _mixed_tensors(read: Sequence[Mapping[int, Sequence[Any]]]) -> tuple[int, ...]:
    """Bytes of every tensor of the layers' linear weights, where some are in 4 bits and others of the same layer are
    not, or in blocks of another size than 64; () where `storage` says it all.

    Args:
        read: each layer's groups of projections.
    """
    layers = [
        [
            projection.weight
            for group in groups.values()
            for projection in group
            if isinstance(projection, LinearProjection)
        ]
        for groups in read
    ]
    weights = [weight for layer in layers for weight in layer]
    # By class: 4 bits with 8-bit products have further tensors, and are never mixed.
    four_bit = [weight for weight in weights if type(weight) is FourBitWeight]
    dense = [weight for weight in weights if isinstance(weight, DenseWeight)]
    alike = all(len({type(weight) for weight in layer}) == 1 for layer in layers)
    if len(four_bit) + len(dense) < len(weights) or (
        alike and all(weight.state.blocksize == 64 for weight in four_bit)
    ):
        return ()
    sizes = [weight.stored_bytes for weight in four_bit] + [(weight.weight.nbytes,) for weight in dense]
    return tuple(size for tensors in sizes for size in tensors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _storage(projection: Any, dtype: torch.dtype) -> str:
    """A weight's own description as one of `memory.shape.STORAGES`; in the compute dtype where it is none."""
    described = projection.weight.storage if isinstance(projection, LinearProjection) else ""
    described = described.replace("fp4", "nf4")
    return described if described in STORAGES else _name(dtype)


@dataclass(frozen=True)
class Limits:
    """Bytes that a run may reserve on its GPU and pin on the host, and the GPU's rates."""

    budget: int
    host: int
    rates: Rates


def device_limits(binding: Binding, budget: str | int) -> Limits:
    """What a budget allows on a model's device.

    Raises:
        BudgetInvalid: it is no size.
    """
    device = next(binding.model.parameters()).device
    free, name = None, "H200"
    host = int(available_host_bytes() * HOST_SHARE)
    if device.type == "cuda":
        free = gpu_memory(device).within_reach
        name = torch.cuda.get_device_name(device)
        pool = host_pool(device)
        # What is available changes from one look to the next: what a plan counts on is what it gets.
        pool.limit = host if pool.limit is None else pool.limit
        host = max(pool.limit - LARGEST_CHUNK, 0)
    return Limits(parse_budget(budget, free), host, rates_of(name))


def placed_bytes(binding: Binding) -> int | None:
    """What the allocator holds for weights, adapters and gradients, once they lie as steps want them; else None."""
    device = next(binding.model.parameters()).device
    if device.type != "cuda" or not binding.laid_out:
        return None
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def plan_levels(binding: Binding, budget: str | int, batch: Batch, **more: Any) -> Plan:
    """Choose the save levels of a bound model on a GPU for a budget, set them, and reserve the host memory they need.

    Args:
        budget: bytes that torch may reserve, a text such as "17.5GiB", or "auto".
        batch: the largest batch that will come.

    Raises:
        BudgetTooSmall, BudgetInvalid: as `memory.plan` does.
    """
    limits = device_limits(binding, budget)
    keep_expanded_weights(binding, False)
    shape = shape_of(binding, placed=placed_bytes(binding), **more)
    if shape.placed is not None:
        by_sizes = sum(shape.weight_tensors()) + sum(shape.laid_out_tensors())
        held = shape.placed / 2**30, by_sizes / 2**30
        logger.info("pronghorn: weights, adapters and gradients hold %.3f GiB, %.3f by their sizes", *held)
    limit, rates, host = limits.budget, limits.rates, limits.host
    there = 0 if shape.placed is None else vision_bytes(binding, 0)
    aside = vision_bytes(binding, batch.tokens) - there
    try:
        found = plan(shape, limit - aside, batch, rates=rates, host_limit=host)
    except BudgetTooSmall:
        # An upper bound, of which a run may need little; the tower's weights are there.
        weights = vision_bytes(binding, 0) - there
        if aside == weights:
            raise
        aside = weights
        found = plan(shape, limit - aside, batch, rates=rates, host_limit=host)
    limit -= aside
    kept = plan_with_expanded(shape, limit, batch, rates, host)
    if kept is not None and kept.time.total < found.time.total:
        found = kept
        keep_expanded_weights(binding, True)
    if aside:
        reason = f"{aside / 2**30:.2f} GiB more are set aside for the vision tower"
        found = replace(found, reasons=(*found.reasons, reason))
    apply(binding, found, shape)
    return found


def plan_with_expanded(shape: ModelShape, limit: int, batch: Batch, rates: Rates, host: int) -> Plan | None:
    """The plan with 4-bit weights also kept as their products multiply them; None where that is not possible."""
    # The stacks of a mixture's experts, most of its weights, stay in 4 bits whatever is kept of the others.
    if not shape.storage.startswith("nf4") or shape.layer_storages or shape.mixture is not None:
        return None

    def linears(storage: str) -> tuple[int, ...]:
        of_modules = (stored_tensors(*shape.module_linear(names), storage) for names in shape.modules)
        return tuple(chain.from_iterable(of_modules)) * shape.layers

    multiplied = linears(shape.multiplied)
    # The one of the two that a shape of the other leaves out. As torch's allocator counts them, in whole 512 bytes;
    # what is in 16 bits among mixed weights is counted twice.
    left_out = multiplied if shape.elsewhere else shape.linear_tensors or linears(shape.storage)
    beside = sum(-(-size // 512) * 512 for size in left_out)
    # The search leaves free what weights as they are multiplied ask for; these are 4-bit weights all the same.
    room = without_margin(limit, shape) - beside
    if room <= 0:
        return None
    apart = shape.fused or shape.fused_gate_up or shape.latent is not None or shape.delta is not None
    expanded = replace(
        shape,
        storage=shape.multiplied,
        linear_tensors=multiplied,
        placed=None,
        gathered=False,
        joined=shape.joined or (shape.multiplied in ("bfloat16", "float16") and not apart),
    )
    found = plan_if_it_fits(expanded, with_margin(room, expanded), batch, rates=rates, host_limit=host)
    if found is None:
        return None
    more = found.estimate
    estimate = replace(
        more,
        fixed=more.fixed + beside,
        weights=more.weights + beside,
        allocated=more.allocated + beside,
        reserved=more.reserved + beside,
        moments={name: size + beside for name, size in more.moments.items()},
    )
    reason = "4-bit weights are also kept as their products multiply them: there is room"
    return replace(found, budget=limit, estimate=estimate, reasons=(*found.reasons, reason))


def keep_expanded_weights(binding: Binding, keep: bool) -> int:
    """Hold or let go what the products of 4-bit weights are made of; returns the bytes that are held."""
    return sum(keep_expanded(filter(is_four_bit, layer.modules()), keep) for layer in binding.layers)


def apply(binding: Binding, found: Plan, shape: ModelShape) -> None:
    """Set a plan's levels, made for a model of this shape; on a GPU the pinned memory is taken now, so that a step can
    be captured."""
    binding.use_plan(found.levels, found.tile_rows)
    binding.piece = found.estimate.piece
    binding.spare = max(found.budget - with_margin(found.estimate.reserved, shape), 0)
    reserve_host((binding, found.batch.tokens))


def reserve_host(*passes: tuple[Binding, int]) -> None:
    """Take the pinned memory that passes of a model's decoders, each over so many tokens, park together at the current
    save levels; why there is less is told."""
    binding = passes[0][0]
    device = next(binding.model.parameters()).device
    parking = [(one, tokens) for one, tokens in passes if any(map(parks, one.save_levels))]
    if device.type != "cuda" or not parking:
        return
    refused = host_pool(device).reserve(sum(host_bytes(one, tokens) for one, tokens in parking))
    if refused is not None:
        binding.tell_once(f"layers keep on the GPU what should wait in host memory: {refused}")


def levels_without_gpu(binding: Binding, batch: Batch, available: int) -> Level:
    """The level that rebuilds least while what the layers keep of `batch` takes no more than half of the `available`
    bytes; the engine's other tensors and the system have the rest."""
    widths = shape_of(binding).widths
    levels: tuple[Level, ...] = ("all", "matmuls", "attention")
    for level in levels:
        if kept_bytes_per_token(level, widths) * batch.tokens * len(binding.layers) <= available // 2:
            return level
    return "none"


def host_bytes(binding: Binding, tokens: int) -> int:
    """Pinned bytes that a pass over `tokens` parks at the current save levels, each tensor's rounding included."""
    widths = shape_of(binding).widths
    return sum(
        -(-host_bytes_per_token(level, widths) * tokens // 512) * 512 + 16 * 512
        for level in binding.save_levels
    )
