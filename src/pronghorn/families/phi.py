"""Phi-3, Phi-3.5 and Phi-4: q, k, v in one module and gate, up in another; part of each head rotated, LongRoPE."""

from typing import Any

from pronghorn.families.spec import DecoderFamily, LayerParts, window_everywhere


def _drops(config: Any) -> str | None:
    """`resid_pdrop`."""
    return f"resid_pdrop={config.resid_pdrop}" if config.resid_pdrop else None


FAMILY = DecoderFamily(
    name="Phi-3",
    model_types=("phi3",),
    prefix="Phi3",
    parts=LayerParts(qkv="qkv_proj", gate_up="gate_up_proj", activation="activation_fn"),
    window=window_everywhere,
    unsupported=_drops,
)
