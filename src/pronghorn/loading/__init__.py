"""Models and adapters in: checkpoints of every kind, checked before they are loaded, bound after."""

from pronghorn.loading.fast import (
    FastLanguageModel,
    FastModel,
    FastVisionModel,
    is_bfloat16_supported,
    save_level,
)
from pronghorn.loading.model import load_model
from pronghorn.loading.tokenizer import load_tokenizer

__all__ = [
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "is_bfloat16_supported",
    "load_model",
    "load_tokenizer",
    "save_level",
]
