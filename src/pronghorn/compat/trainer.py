"""The trainer as scripts for Unsloth know it."""

from __future__ import annotations

import logging
from typing import Any

from pronghorn.engine import base_causal_lm
from pronghorn.errors import DropInUnavailable
from pronghorn.training import SFTTrainer

logger = logging.getLogger("pronghorn")

_IMAGES = ("image", "images", "pixel_values")


class ScriptTrainer(SFTTrainer):
    """`pronghorn.SFTTrainer` with what scripts ask of it: an embedding learning rate, and clear words about images."""

    def __init__(self, model: Any, args: Any = None, *more: Any, **given: Any) -> None:
        _refuse_images(given.get("train_dataset"))
        super().__init__(model, args, *more, **given)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = getattr(self.args, "embedding_learning_rate", None)
        if rate is not None:
            give_own_rate(optimizer, _embeddings(self.model), rate)
        return optimizer


#: The name in scripts; what `trl.SFTTrainer` is to a script is the same class.
UnslothTrainer = ScriptTrainer


def give_own_rate(optimizer: Any, parameters: list[Any], rate: float) -> None:
    """Move parameters into groups of their own, which differ from those they come from in the learning rate alone.

    To be called before the schedule is made: it multiplies each group's own rate.
    """
    chosen = {id(parameter) for parameter in parameters}
    if any(group.get("has_own_rate") for group in optimizer.param_groups):
        return
    moved = 0
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in chosen]
        if not mine:
            continue
        moved += len(mine)
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        optimizer.add_param_group({**group, "params": mine, "lr": rate, "has_own_rate": True})
    if moved == 0:
        logger.warning(
            "pronghorn: embedding_learning_rate has no effect: neither embed_tokens nor lm_head is trained; "
            "name them in target_modules"
        )


def _embeddings(model: Any) -> list[Any]:
    """Trained parameters of the embedding and the head, whatever PEFT has put around them."""
    base = base_causal_lm(model)
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    found = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    return list({id(p): p for p in found}.values())


class UnslothVisionDataCollator:
    """Makes batches with images, which are not trained on here.

    Raises:
        DropInUnavailable: always.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        raise _no_images("UnslothVisionDataCollator")


def _refuse_images(rows: Any) -> None:
    first = next(iter(rows), None) if isinstance(rows, list) or hasattr(rows, "column_names") else None
    if not isinstance(first, dict):
        return
    parts = [part for m in first.get("messages") or [] if isinstance(m, dict)
             for part in (m["content"] if isinstance(m.get("content"), list) else [])]  # fmt: skip
    column = next((name for name in _IMAGES if name in first), None)
    if column is not None:
        raise _no_images(f"the column '{column}'")
    if any(isinstance(part, dict) and part.get("type") in ("image", "video") for part in parts):
        raise _no_images("a message")


def _no_images(where: str) -> DropInUnavailable:
    return DropInUnavailable(
        f"{where} holds images, and models are trained on text here",
        fix="leave images out of the rows, or train this model with its own library",
    )


def unsloth_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`trainer.train()`; the loss is that of all supervised tokens of a step in any case."""
    return trainer.train(*args, **kwargs)
