"""Supervised fine-tuning on TRL's trainer, with the engine's loss, packing, and checkpoints that resume exactly."""

from pronghorn.training.config import SFTConfig
from pronghorn.training.responses import train_on_responses_only
from pronghorn.training.trainer import SFTTrainer

__all__ = ["SFTConfig", "SFTTrainer", "train_on_responses_only"]
