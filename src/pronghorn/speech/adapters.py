"""LoRA on the two transformers, or on one of them."""

from __future__ import annotations

from typing import Any, Literal

from pronghorn.errors import UnknownArgument
from pronghorn.loading.adapters import DEFAULT_TARGETS, add_adapter

Half = Literal["both", "slow", "fast"]


def add_speech_adapter(
    model: Any,
    r: int = 16,
    lora_alpha: float = 16,
    half: Half = "both",
    random_state: int = 3407,
    **settings: Any,
) -> Any:
    """A PEFT model with a new LoRA adapter on a `DualARModel`; everything else is frozen.

    Args:
        half: which transformer is adapted: the slow one decides what is said and how, the fast one how it sounds.
        settings: further arguments of `peft.LoraConfig`; `target_modules` names projections of either.

    Raises:
        UnknownArgument: for another half.
        AdapterProblem, TargetModuleNotFound: as in `FastLanguageModel.get_peft_model`.
    """
    if half not in ("both", "slow", "fast"):
        raise UnknownArgument(f"half='{half}' is none", fix="use 'both', 'slow' or 'fast'")
    targets = settings.pop("target_modules", DEFAULT_TARGETS)
    if not isinstance(targets, str):
        which = "slow|fast" if half == "both" else half
        targets = rf"({which})\.model\.layers\..*\.({'|'.join(targets)})"
    # No task: PEFT's classes for causal LMs would offer `generate`, which knows nothing of frames.
    return add_adapter(
        model, random_state, r=r, lora_alpha=lora_alpha, target_modules=targets, task_type=None, **settings
    )
