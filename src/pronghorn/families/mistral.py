"""Mistral: Llama with a sliding attention window in every layer, where the config sets one."""

from typing import Any

from pronghorn.families.spec import DecoderFamily


def _window(config: Any, layer_index: int) -> int | None:
    return getattr(config, "sliding_window", None)


FAMILY = DecoderFamily(name="Mistral", model_types=("mistral",), prefix="Mistral", window=_window)
