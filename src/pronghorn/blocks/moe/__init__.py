"""Mixtures of experts with hand-derived backward passes and declared saves."""

from pronghorn.blocks.moe.balance import RouterBalance
from pronghorn.blocks.moe.block import MoeBlock, MoeSaves
from pronghorn.blocks.moe.experts import ExpertAdapter, ExpertProjection
from pronghorn.blocks.moe.shared import SharedExpert

__all__ = [
    "ExpertAdapter",
    "ExpertProjection",
    "MoeBlock",
    "MoeSaves",
    "RouterBalance",
    "SharedExpert",
]
