"""Small models, rows and trainers for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from pronghorn.engine import bind
from pronghorn.training import SFTConfig, SFTTrainer
from tests.tiny import tiny_model, tiny_tokenizer

TARGETS = ["q_proj", "v_proj", "down_proj"]


def chats(count: int = 12) -> Dataset:
    """Conversations of very different lengths."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "why " * (1 + 5 * i % 7)},
                {"role": "assistant", "content": "because " * (1 + 3 * i % 8)},
            ]
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def adapter_model(family: str = "llama", *, dropout: float = 0.0, bound: bool = True, seed: int = 0) -> Any:
    """A tiny model with a LoRA adapter whose B is not zero, so that every gradient is."""
    model = tiny_model(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, lora_dropout=dropout))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    if bound:
        bind(model)
    return model


def settings(folder: Path, **options: Any) -> SFTConfig:
    """A quiet, plain run: SGD with a constant rate, so that a step shows its gradient."""
    given = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "report": False,
        "disable_tqdm": True,
        "use_cpu": True,  # exact comparisons; test_gpu.py is for the GPU
        "dataloader_pin_memory": False,
        **options,
    }
    return SFTConfig(**given)


def trainer(folder: Path, model: Any = None, rows: Any = None, **options: Any) -> SFTTrainer:
    """A trainer; keyword arguments of SFTTrainer are told from those of SFTConfig by name."""
    own = {
        name: options.pop(name)
        for name in ("eval_dataset", "callbacks", "formatting_func", "data_collator", "compute_metrics")
        if name in options
    }
    return SFTTrainer(
        model=adapter_model() if model is None else model,
        args=settings(folder, **options),
        train_dataset=chats() if rows is None else rows,
        processing_class=tiny_tokenizer(),
        **own,
    )


def trained(model: Any) -> dict[str, torch.Tensor]:
    """The trained parameters by name, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(run: SFTTrainer) -> list[float]:
    """The logged training losses."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
