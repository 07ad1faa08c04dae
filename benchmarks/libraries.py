"""How each library loads a checkpoint, puts LoRA on it and builds its trainer. One function per library.

Imports are inside the functions: a side's process must hold no library but its own, since Unsloth changes
Transformers, PEFT and TRL for the whole process and has to be imported before them.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.registry import Side, Workload

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Job:
    """One side of one workload, ready to be built."""

    workload: Workload
    side: Side
    checkpoint: Path
    output: Path
    steps: int
    optimizer: str = "adamw_torch"


def build_trainer(job: Job, rows: list[list[int]]) -> Any:
    """The side's SFT trainer over pre-tokenised rows; every token but a row's first is supervised."""
    return {"hf": _stock, "liger": _stock, "unsloth": _unsloth, "pronghorn": _pronghorn}[job.side.library](
        job, rows
    )


def import_library(library: str) -> None:
    """Import what must come first."""
    if library == "unsloth":
        import unsloth  # noqa: F401
    elif library == "pronghorn":
        import pronghorn  # noqa: F401


def _dataset(rows: list[list[int]]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": rows})


def _arguments(job: Job, config_class: type, **changes: Any) -> Any:
    """The trainer's arguments, the same for every side; what a library's class does not know is left out."""
    import torch

    workload, on_gpu = job.workload, torch.cuda.is_available()
    wanted: dict[str, Any] = {
        "output_dir": str(job.output),
        "per_device_train_batch_size": rows_per_batch(workload, job.side),
        "gradient_accumulation_steps": 1,
        "max_steps": job.steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": job.optimizer,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "max_length": workload.length,
        "packing": job.side.packing,
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3407,
        "train_sampling_strategy": "sequential",
        **changes,
    }
    known = _argument_names(config_class)
    lacking = wanted.keys() - known
    if lacking - OPTIONAL_ARGUMENTS:
        raise TypeError(
            f"{config_class.__name__} does not take {', '.join(sorted(lacking - OPTIONAL_ARGUMENTS))}"
        )
    return config_class(**{key: value for key, value in wanted.items() if key in known})


#: what a side may lack without doing other work
OPTIONAL_ARGUMENTS = {"train_sampling_strategy", "use_cpu"}


def _argument_names(config_class: type) -> set[str]:
    """Names that a config class takes: of its __init__ and, since that may end in **kwargs, of its fields."""
    fields = {field.name for field in dataclasses.fields(config_class) if field.init}
    return fields | set(inspect.signature(config_class.__init__).parameters)


def rows_per_batch(workload: Workload, side: Side) -> int:
    """Rows a batch; where a side packs, as many full rows as hold the tokens of the unpacked batch."""
    if not (side.packing and workload.mixed):
        return workload.rows
    return max(1, round(workload.rows * MIXED_MEAN / workload.length))


#: mean length of the log-normal lengths in `benchmarks.rows`
MIXED_MEAN = 145


def _stock(job: Job, rows: list[list[int]]) -> Any:
    """Transformers + PEFT + TRL as their documentation shows it; with Liger's kernels where the side asks for them."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    on_gpu = torch.cuda.is_available()
    keywords: dict[str, Any] = {"dtype": torch.bfloat16 if on_gpu else torch.float32}
    if on_gpu:
        keywords |= {"attn_implementation": "sdpa", "device_map": {"": 0}}
    if job.workload.four_bit:
        keywords["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, **keywords)
    arguments = _arguments(
        job,
        SFTConfig,
        gradient_checkpointing=bool(job.side.checkpointing),
        use_liger_kernel=job.side.library == "liger",
    )
    lora = LoraConfig(
        r=job.workload.rank,
        lora_alpha=job.workload.rank,
        lora_dropout=0.0,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(rows),
        processing_class=AutoTokenizer.from_pretrained(job.checkpoint),
        peft_config=lora,
    )


def _fast_model(job: Job, fast_class: Any) -> tuple[Any, Any]:
    """The call that Unsloth's notebooks make and pronghorn answers too."""
    import torch

    model, tokenizer = fast_class.from_pretrained(
        str(job.checkpoint),
        max_seq_length=job.workload.length,
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        load_in_4bit=job.workload.four_bit,
    )
    model = fast_class.get_peft_model(
        model,
        r=job.workload.rank,
        lora_alpha=job.workload.rank,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing=job.side.checkpointing,
        random_state=3407,
    )
    return model, tokenizer


def _unsloth(job: Job, rows: list[list[int]]) -> Any:
    """Unsloth as its notebooks use it; "tuned" switches checkpointing off in both places that decide it."""
    from unsloth import FastLanguageModel  # isort: skip  (before trl)
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = _fast_model(job, FastLanguageModel)
    changes = {} if job.side.checkpointing else {"gradient_checkpointing": False}
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=_dataset(rows),
        args=_arguments(job, SFTConfig, **changes),
    )


def _pronghorn(job: Job, rows: list[list[int]]) -> Any:
    from pronghorn import FastLanguageModel, SFTConfig, SFTTrainer

    model, tokenizer = _fast_model(job, FastLanguageModel)
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=_dataset(rows),
        args=_arguments(job, SFTConfig, gradient_checkpointing=False),
    )
