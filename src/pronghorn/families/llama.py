"""Llama 2, Llama 3.x (scaled RoPE comes from Transformers' rotary module) and what shares their architecture."""

from pronghorn.families.spec import DecoderFamily

FAMILY = DecoderFamily(name="Llama", model_types=("llama",), prefix="Llama")
