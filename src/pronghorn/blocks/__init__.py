"""Attention and GLU blocks with hand-derived backward passes and declared saves. No Transformers in here."""

from pronghorn.blocks.attention import AttentionBlock
from pronghorn.blocks.delta_net import DeltaNetBlock
from pronghorn.blocks.glu import GluBlock
from pronghorn.blocks.latent_attention import LatentAttentionBlock
from pronghorn.blocks.layer import AttentionPart, DecoderLayer, LayerSaves, MlpBlock
from pronghorn.blocks.levels import (
    LEVELS,
    LayerWidths,
    Level,
    check_level,
    check_levels,
    host_bytes_per_token,
    keeps,
    kept_bytes_per_token,
    parks,
    saved_bytes_per_token,
)
from pronghorn.blocks.norm import NoNorm, Norm
from pronghorn.blocks.projection import (
    Adapter,
    GradientSink,
    LinearProjection,
    ModuleProjection,
    PackedAdapters,
    ProjectionGroup,
    SplitGroup,
)

__all__ = [
    "LEVELS",
    "Adapter",
    "AttentionBlock",
    "AttentionPart",
    "DecoderLayer",
    "DeltaNetBlock",
    "GluBlock",
    "GradientSink",
    "LatentAttentionBlock",
    "LayerSaves",
    "LayerWidths",
    "Level",
    "LinearProjection",
    "MlpBlock",
    "ModuleProjection",
    "NoNorm",
    "Norm",
    "PackedAdapters",
    "ProjectionGroup",
    "SplitGroup",
    "check_level",
    "check_levels",
    "host_bytes_per_token",
    "keeps",
    "kept_bytes_per_token",
    "parks",
    "saved_bytes_per_token",
]
