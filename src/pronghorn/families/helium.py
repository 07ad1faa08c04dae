"""Helium: Llama that turns neighbouring pairs."""

from pronghorn.families.spec import DecoderFamily

FAMILY = DecoderFamily(name="Helium", model_types=("helium",), prefix="Helium", turns="pairs")
