"""ERNIE 4.5 (dense): Llama that turns neighbouring pairs."""

from pronghorn.families.spec import DecoderFamily

FAMILY = DecoderFamily(name="ERNIE 4.5", model_types=("ernie4_5",), prefix="Ernie4_5", turns="pairs")
