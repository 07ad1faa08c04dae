"""Arguments of older TRL versions, given to the trainer: accepted with one note each."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from pronghorn.errors import nearest
from pronghorn.training.config import SFTConfig

logger = logging.getLogger("pronghorn")

#: Older argument of SFTTrainer -> field of SFTConfig.
_MOVED = {
    "dataset_text_field": "dataset_text_field",
    "max_seq_length": "max_length",
    "max_length": "max_length",
    "packing": "packing",
    "eval_packing": "eval_packing",
    "dataset_num_proc": "dataset_num_proc",
    "dataset_kwargs": "dataset_kwargs",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "model_init_kwargs": "model_init_kwargs",
}
#: Older arguments without a meaning today.
_GONE = {"dataset_batch_size", "num_of_sequences", "chars_per_token", "infinite"}

_CURRENT = {
    "model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "compute_loss_func",
    "compute_metrics", "callbacks", "optimizers", "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics",
    "quantization_config", "peft_config", "formatting_func",
}  # fmt: skip


def take_older_arguments(older: dict[str, Any], args: SFTConfig, processing_class: Any) -> Any:
    """Apply arguments that SFTTrainer had once; returns the processing class.

    Raises:
        TypeError: an argument that no version has, with the nearest known name.
    """
    for name, value in older.items():
        if name == "tokenizer":
            logger.warning("pronghorn: tokenizer= is called processing_class= now")
            processing_class = value if processing_class is None else processing_class
        elif name in _MOVED:
            logger.warning("pronghorn: %s= belongs to SFTConfig now, as %s", name, _MOVED[name])
            if value is not None:
                setattr(args, _MOVED[name], value)
        elif name in _GONE:
            logger.warning("pronghorn: %s= has no effect any more", name)
        else:
            hint = nearest(name, _CURRENT | _MOVED.keys() | {"tokenizer"})
            raise TypeError(f"SFTTrainer has no argument '{name}'" + (f": {hint}" if hint else ""))
    return processing_class


def usable_optimizer(optim: str, cuda: bool | None = None) -> str:
    """`optim`, or adamw_torch (said once) where it needs a GPU or bitsandbytes that are not there."""
    if not any(mark in optim for mark in ("8bit", "4bit", "paged", "bnb")):
        return optim
    cuda = torch.cuda.is_available() if cuda is None else cuda
    if cuda and importlib.util.find_spec("bitsandbytes") is not None:
        return optim
    missing = "bitsandbytes is not installed" if cuda else "there is no CUDA GPU"
    logger.warning(
        "pronghorn: optim='%s' needs what is missing here (%s): adamw_torch is used", optim, missing
    )
    return "adamw_torch"
