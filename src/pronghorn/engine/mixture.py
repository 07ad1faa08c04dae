"""From a layer's live mixture of experts to the block that computes it, and the balance of its experts in the loss."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from pronghorn.blocks import ProjectionGroup
from pronghorn.blocks.levels import ROOMY_TILES
from pronghorn.blocks.moe import MoeBlock, RouterBalance, SharedExpert
from pronghorn.engine.binding import Binding
from pronghorn.engine.experts import innermost, read_router, read_router_bias, read_stacks
from pronghorn.engine.layer_call import LayerCall, ReadGroups
from pronghorn.engine.read import read_norm


def moe_block(layer: Any, call: LayerCall, read: ReadGroups) -> MoeBlock:
    """The second half of a layer whose MLP is a mixture of experts."""
    binding = call.binding
    parts, mixture = binding.family.parts, binding.family.mixture
    assert mixture is not None and parts.mlp_norm is not None
    mlp = getattr(layer, parts.mlp)
    experts = getattr(mlp, mixture.experts)
    gate_up, down = read_stacks(experts, mixture.transposed)
    rows = binding.tile_rows
    tiles = {} if rows is None or rows >= ROOMY_TILES else {"tile_tokens": rows}
    return MoeBlock(
        norm=read_norm(getattr(layer, parts.mlp_norm), binding.family.norm_offset),
        router=ProjectionGroup([read_router(getattr(mlp, mixture.router))]),
        scoring=mixture.scoring(binding.config),
        router_bias=read_router_bias(getattr(mlp, mixture.router), mixture.router_bias),
        gate_up=gate_up,
        down=down,
        gating=mixture.gating(innermost(experts), binding.activation),
        balance=call.balance,
        shared=None if mixture.shared is None else _shared_expert(read, binding.activation),
        **tiles,
    )


def _shared_expert(read: ReadGroups, activation: str) -> SharedExpert:
    groups = {slot: ProjectionGroup(found, packed) for slot, (found, packed) in read.items()}
    return SharedExpert(groups[4], groups[6], activation, groups.get(7))


# --- the auxiliary loss ----------------------------------------------------------------------------------------

#: under which a `RouterBalance` comes to the decoder
BALANCE = "pronghorn_balance"


def balance_of(binding: Binding, labels: Tensor, kwargs: dict[str, Any]) -> RouterBalance | None:
    """Where routers are to take down what they do, or None where nobody asks for it.

    Of a packed stream the tokens count whose documents somebody learns from: others may be there to fill it up.
    """
    asked = kwargs.get("output_router_logits")
    wanted = getattr(binding.config, "output_router_logits", False) if asked is None else asked
    if binding.family.mixture is None or not binding.family.mixture.balanced or not wanted:
        return None
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        return RouterBalance()
    supervised = labels.reshape(-1) != -100
    tokens = torch.arange(supervised.numel(), device=bounds.device, dtype=bounds.dtype)
    documents = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)
    learned = torch.zeros(bounds.numel(), device=bounds.device).scatter_add_(0, documents, supervised.float())
    return RouterBalance(learned[documents] > 0)


def with_balance(
    model: Any,
    balance: RouterBalance,
    loss: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None,
    router_logits: Any,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss with the balance of experts added, and the balance L.

        loss + router_aux_loss_coef · L · (supervised tokens here / num_items_in_batch)

    so that the parts of a step weigh as their tokens do, and a step's weights add up to one.

    Args:
        router_logits: of all layers, where the stock decoder ran.
    """
    share: Tensor | float = 1.0
    if num_items_in_batch is not None:
        share = (labels[:, 1:] != -100).sum() / num_items_in_batch
    weight = model.config.router_aux_loss_coef * share
    if not router_logits:
        return balance.added_to(loss, weight), balance.loss()
    stock = sys.modules[type(model).__module__].load_balancing_loss_func
    mixture = model.pronghorn_binding.family.mixture
    scoring = mixture.scoring(model.config)
    found = stock(router_logits, scoring.experts, scoring.top_k, attention_mask)
    return loss + weight * found.to(loss.device), found
