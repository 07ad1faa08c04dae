"""Fast, lean fine-tuning of language models on stock Hugging Face checkpoints, PEFT adapters and TRL trainers.

`import pronghorn` loads none of them and changes nothing: every public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pronghorn.errors import PronghornError
from pronghorn.importing import collector_paused

if TYPE_CHECKING:
    from pronghorn.data.chat_templates import get_chat_template
    from pronghorn.data.sharegpt import standardize_data_formats, standardize_sharegpt
    from pronghorn.data.vision import VisionDataCollator
    from pronghorn.embedding import EmbeddingConfig, EmbeddingTrainer, FastEmbeddingModel
    from pronghorn.engine import bind, binding_of
    from pronghorn.inference.synthesis import synthesize
    from pronghorn.loading import FastLanguageModel, FastModel, FastVisionModel, is_bfloat16_supported
    from pronghorn.quantising.settings import DynamicQuantisation
    from pronghorn.training import SFTConfig, SFTTrainer, train_on_responses_only

__version__ = "0.1.0"

__all__ = [
    "DynamicQuantisation",
    "EmbeddingConfig",
    "EmbeddingTrainer",
    "FastEmbeddingModel",
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "PronghornError",
    "SFTConfig",
    "SFTTrainer",
    "VisionDataCollator",
    "__version__",
    "bind",
    "binding_of",
    "get_chat_template",
    "is_bfloat16_supported",
    "standardize_data_formats",
    "standardize_sharegpt",
    "synthesize",
    "train_on_responses_only",
]

_HOME = {
    "EmbeddingConfig": "pronghorn.embedding",
    "EmbeddingTrainer": "pronghorn.embedding",
    "FastEmbeddingModel": "pronghorn.embedding",
    "DynamicQuantisation": "pronghorn.quantising.settings",
    "FastLanguageModel": "pronghorn.loading",
    "FastModel": "pronghorn.loading",
    "FastVisionModel": "pronghorn.loading",
    "SFTConfig": "pronghorn.training",
    "SFTTrainer": "pronghorn.training",
    "VisionDataCollator": "pronghorn.data.vision",
    "bind": "pronghorn.engine",
    "binding_of": "pronghorn.engine",
    "get_chat_template": "pronghorn.data.chat_templates",
    "is_bfloat16_supported": "pronghorn.loading",
    "standardize_data_formats": "pronghorn.data.sharegpt",
    "standardize_sharegpt": "pronghorn.data.sharegpt",
    "synthesize": "pronghorn.inference.synthesis",
    "train_on_responses_only": "pronghorn.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pronghorn' has no attribute '{name}'")
    with collector_paused():
        return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
