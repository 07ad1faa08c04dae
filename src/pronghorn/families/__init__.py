"""The model families with a fast path. Adding one: a `DecoderFamily` in a file of its own, listed here."""

from pronghorn.families import (
    cohere,
    deepseek,
    ernie,
    gemma,
    glm,
    gpt_oss,
    granite,
    helium,
    llama,
    mistral,
    mixtral,
    olmo,
    phi,
    qwen,
    qwen_hybrid,
    qwen_moe,
    smollm,
)
from pronghorn.families.mixture import MOE, MixtureParts
from pronghorn.families.spec import (
    ACTIVATIONS,
    DELTA,
    KV_UP,
    Q_UP,
    DecoderFamily,
    DeltaParts,
    LatentParts,
    LayerParts,
    Scales,
)
from pronghorn.families.stock import STOCK

FAMILIES: tuple[DecoderFamily, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    mistral.MINISTRAL,
    mistral.MINISTRAL3,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen.QWEN2_VL,
    qwen.QWEN2_5_VL,
    qwen.QWEN3_VL,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    gemma.GEMMA3_VISION,
    phi.FAMILY,
    granite.FAMILY,
    smollm.FAMILY,
    cohere.COHERE,
    cohere.COHERE2,
    glm.GLM,
    glm.GLM4,
    ernie.FAMILY,
    helium.FAMILY,
    olmo.OLMO2,
    olmo.OLMO3,
    olmo.EXAONE4,
    mixtral.FAMILY,
    qwen_moe.QWEN2_MOE,
    qwen_moe.QWEN3_MOE,
    qwen_hybrid.QWEN3_NEXT,
    qwen_hybrid.QWEN3_5,
    qwen_hybrid.QWEN3_5_MOE,
    qwen_hybrid.QWEN3_5_VISION,
    qwen_hybrid.QWEN3_5_MOE_VISION,
    gpt_oss.FAMILY,
    deepseek.DEEPSEEK_V2,
    deepseek.DEEPSEEK_V3,
    deepseek.GLM4_MOE_LITE,
    deepseek.YOUTU,
    deepseek.MINICPM3,
)

__all__ = [
    "ACTIVATIONS",
    "DELTA",
    "FAMILIES",
    "KV_UP",
    "MOE",
    "Q_UP",
    "STOCK",
    "DecoderFamily",
    "DeltaParts",
    "LatentParts",
    "LayerParts",
    "MixtureParts",
    "Scales",
    "family_of",
]


def family_of(model_type: str) -> DecoderFamily | None:
    """The family that covers `config.model_type`, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
