"""Rows with images: the collator that reads them, and what the trainer must leave alone for it."""

from __future__ import annotations

from typing import Any

from pronghorn.data.images import has_images
from pronghorn.data.vision import VisionDataCollator, share_template
from pronghorn.errors import TokenizerProblem
from pronghorn.training.config import SFTConfig


def vision_collator(model: Any, args: SFTConfig, collator: Any, processing_class: Any, rows: Any) -> Any:
    """The collator that was given, or for rows with images, where none was, one that reads them.

    Rows with images, and those for a collator that reads them, stay as they are until it gets them: the configuration
    is changed so.

    Raises:
        TokenizerProblem: the rows hold images, and the processing class reads none.
    """
    share_template(processing_class)
    with_images = rows is not None and has_images(next(iter(rows), None))
    if collator is None and with_images:
        if getattr(processing_class, "image_processor", None) is None:
            raise TokenizerProblem(
                f"the rows hold images, and {type(processing_class).__name__} reads none",
                fix="load the model with FastVisionModel and give its processor as processing_class",
            )
        collator = VisionDataCollator(model, processing_class, responses_only=bool(args.assistant_only_loss))
    ours = isinstance(collator, VisionDataCollator)
    if ours and collator.max_length is None and isinstance(args.max_length, int):
        collator.max_length = args.max_length
    if ours or with_images:
        args.remove_unused_columns = False
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    return collator
