"""Linear projections with adapters: explicit forward, input gradient and parameter gradients.

For projections i that share their input X [T, in]:

    Y_i  = X W_iᵀ + b_i + Σ_adapters s · drop(X) Aᵀ Bᵀ
    dX   = Σ_i dY_i W_i + Σ_adapters drop'(s · dY_i B · A)
    dA   = (s · dY_i B)ᵀ drop(X),   dB = s · dY_iᵀ (drop(X) Aᵀ),   dW_i = dY_iᵀ X,   db_i = Σ_t dY_i

(LoRA, arXiv 2106.09685; `s` is lora_alpha / r, or lora_alpha / √r with rsLoRA.) Adapters of one group that drop
nothing share one product with X: their A matrices lie stacked as [ΣR, in].
"""

from pronghorn.blocks.projection.group import ProjectionGroup
from pronghorn.blocks.projection.parts import (
    Adapter,
    AdapterGrads,
    GradientSink,
    LinearProjection,
    ModuleProjection,
    PackedAdapters,
    Projection,
    product_for,
    rows_are_independent,
)
from pronghorn.blocks.projection.split import SplitGroup

__all__ = [
    "Adapter",
    "AdapterGrads",
    "GradientSink",
    "LinearProjection",
    "ModuleProjection",
    "PackedAdapters",
    "Projection",
    "ProjectionGroup",
    "SplitGroup",
    "product_for",
    "rows_are_independent",
]
