"""Granite 3 and 4 (dense): Llama with four factors: of the embeddings, the attention's logits, both residual branches
and the output logits. The attention's is its module's `scaling`."""

from typing import Any

from pronghorn.families.spec import DecoderFamily, Scales


def _scales(config: Any) -> Scales:
    """Factors of embeddings, both residual branches and output logits."""
    return Scales(
        embedding=float(config.embedding_multiplier),
        residual=float(config.residual_multiplier),
        logits=1.0 / float(config.logits_scaling),
    )


FAMILY = DecoderFamily(name="Granite", model_types=("granite",), prefix="Granite", scales=_scales)
