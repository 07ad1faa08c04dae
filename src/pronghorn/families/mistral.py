"""Mistral: Llama with a sliding attention window in every layer, where the config sets one."""

from pronghorn.families.spec import DecoderFamily, window_everywhere

FAMILY = DecoderFamily(name="Mistral", model_types=("mistral",), prefix="Mistral", window=window_everywhere)
