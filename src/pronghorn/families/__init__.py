"""The model families with a fast path. Adding one: a `DecoderFamily` in a file of its own, listed here."""

from pronghorn.families import llama, mistral, qwen
from pronghorn.families.spec import ACTIVATIONS, DecoderFamily, LayerParts

FAMILIES: tuple[DecoderFamily, ...] = (llama.FAMILY, mistral.FAMILY, qwen.QWEN2, qwen.QWEN3)

__all__ = ["ACTIVATIONS", "FAMILIES", "DecoderFamily", "LayerParts", "family_of"]


def family_of(model_type: str) -> DecoderFamily | None:
    """The family that covers `config.model_type`, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
