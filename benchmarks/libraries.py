"""How each library loads a checkpoint, puts LoRA on it and builds its trainer. One function per library.

Imports are inside the functions: a side's process must hold no library but its own, since Unsloth changes
Transformers, PEFT and TRL for the whole process and has to be imported before them.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class Loaded:
    """A model ready for a trainer; `peft_config` where the trainer puts the adapter on."""

    model: Any
    tokenizer: Any
    peft_config: Any = None


def build_trainer(job: Job, rows: Mapping[str, list]) -> Any:
    """The side's SFT trainer over pre-tokenised rows, columns by name (`benchmarks.rows.columns`)."""
    return make_trainer(job, load_model(job), rows)


def load_model(job: Job, read: Callable[[], None] = lambda: None) -> Loaded:
    """The checkpoint through the side's own loader.

    Args:
        read: is called when the weights are read, before an adapter is put on.
    """
    return {"hf": _load_stock, "liger": _load_stock, "unsloth": _load_unsloth, "pronghorn": _load_pronghorn}[
        job.side.library
    ](job, read)


def make_trainer(job: Job, loaded: Loaded, rows: Mapping[str, list]) -> Any:
    """The side's own trainer."""
    make = {"hf": _stock, "liger": _stock, "unsloth": _unsloth, "pronghorn": _pronghorn}[job.side.library]
    return make(job, loaded, _dataset(rows))


def import_library(library: str) -> None:
    """Import what must come first."""
    if library == "unsloth":
        import unsloth  # noqa: F401
    elif library == "pronghorn":
        import pronghorn  # noqa: F401


def _dataset(rows: Mapping[str, list]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(dict(rows))


def _arguments(job: Job, config_class: type, **changes: Any) -> Any:
    """The trainer's arguments, the same for every side, and the side's own.

    Raises:
        TypeError: for one that the library's class does not take and that changes the work.
    """
    import torch

    workload, side, on_gpu = job.workload, job.side, torch.cuda.is_available()
    rows, accumulation = batch_shape(workload, side)
    wanted: dict[str, Any] = {
        "output_dir": str(job.output),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "max_steps": job.steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": job.optimizer,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "max_length": workload.length,
        "packing": side.packing,
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3407,
        "train_sampling_strategy": "sequential",
        **changes,
        **side.train,
    }
    known = _argument_names(config_class)
    lacking = wanted.keys() - known - OPTIONAL_ARGUMENTS
    if lacking:
        raise TypeError(_not_taken(side, f"{side.library}'s {config_class.__name__}", sorted(lacking), known))
    return config_class(**{key: value for key, value in wanted.items() if key in known})


#: what a side may lack without doing other work
OPTIONAL_ARGUMENTS = {"train_sampling_strategy", "use_cpu"}


def _argument_names(config_class: type) -> set[str]:
    """Names that a config class takes: of its __init__ and, since that may end in **kwargs, of its fields."""
    fields = {field.name for field in dataclasses.fields(config_class) if field.init}
    return fields | set(inspect.signature(config_class.__init__).parameters)


def _checked(side: Side, function: Callable[..., Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """A side's further arguments, which the function must have by name: **kwargs would swallow them.

    Raises:
        TypeError: for one it does not have.
    """
    known = set(inspect.signature(function).parameters)
    lacking = sorted(extra.keys() - known)
    if lacking:
        raise TypeError(_not_taken(side, function.__qualname__, lacking, known))
    return dict(extra)


def _not_taken(side: Side, what: str, lacking: list[str], known: set[str]) -> str:
    close = [match for name in lacking for match in difflib.get_close_matches(name, known, 1)]
    hint = f"; it has {', '.join(close)}" if close else ""
    return f"side {side.name} needs {what}({', '.join(lacking)}=...), which the installed version does not have{hint}"


def batch_shape(workload: Workload, side: Side) -> tuple[int, int]:
    """(rows a micro-batch, micro-batches a step). A side that packs short rows takes full rows, once a step."""
    if side.batch is not None:
        return side.batch
    if side.packing and workload.mixed:
        return workload.packed_rows, 1
    return workload.rows, workload.accumulation


def dtype_of(workload: Workload) -> Any:
    """The dtype of weights: the workload's, bfloat16 on a GPU, and on a CPU what pronghorn takes there by itself."""
    import torch

    if workload.dtype or torch.cuda.is_available():
        return getattr(torch, workload.dtype or "bfloat16")
    from pronghorn.hardware import probe

    return getattr(torch, probe().compute_dtype.value)


def _load_stock(job: Job, read: Callable[[], None]) -> Loaded:
    """Transformers + PEFT + TRL as their documentation shows it; with Liger's kernels where the side asks for them."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    keywords: dict[str, Any] = {"dtype": dtype_of(job.workload), "attn_implementation": "sdpa"}
    if torch.cuda.is_available():
        keywords |= {"device_map": {"": 0}}
    if job.workload.four_bit:
        keywords["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, **keywords)
    read()
    lora = LoraConfig(
        r=job.workload.rank,
        lora_alpha=job.workload.rank,
        lora_dropout=0.0,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    return Loaded(model, AutoTokenizer.from_pretrained(job.checkpoint), lora)


def _stock(job: Job, loaded: Loaded, dataset: Any) -> Any:
    import torch
    from trl import SFTConfig, SFTTrainer

    changes: dict[str, Any] = {"use_liger_kernel": job.side.library == "liger"}
    if dtype_of(job.workload) is torch.bfloat16:
        changes["bf16"] = True
    return SFTTrainer(
        model=loaded.model,
        args=_arguments(job, SFTConfig, gradient_checkpointing=bool(job.side.checkpointing), **changes),
        train_dataset=dataset,
        processing_class=loaded.tokenizer,
        # A model that has its adapter from an earlier trainer keeps it.
        peft_config=None if hasattr(loaded.model, "peft_config") else loaded.peft_config,
    )


def _load_fast(job: Job, fast_class: Any, read: Callable[[], None]) -> Loaded:
    """The call that Unsloth's notebooks make and pronghorn answers too."""
    side = job.side
    checkpointing = {} if side.checkpointing is None else {"use_gradient_checkpointing": side.checkpointing}
    model, tokenizer = fast_class.from_pretrained(
        str(job.checkpoint),
        max_seq_length=job.workload.length,
        dtype=dtype_of(job.workload),
        load_in_4bit=job.workload.four_bit,
        **_checked(side, fast_class.from_pretrained, side.load),
    )
    read()
    model = fast_class.get_peft_model(
        model,
        r=job.workload.rank,
        lora_alpha=job.workload.rank,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        random_state=3407,
        **checkpointing,
        **_checked(side, fast_class.get_peft_model, side.adapter),
    )
    return Loaded(model, tokenizer)


def _load_unsloth(job: Job, read: Callable[[], None]) -> Loaded:
    from unsloth import FastLanguageModel

    return _load_fast(job, FastLanguageModel, read)


def _unsloth(job: Job, loaded: Loaded, dataset: Any) -> Any:
    """Unsloth as its notebooks use it; "tuned" switches checkpointing off in both places that decide it."""
    import unsloth  # noqa: F401  # isort: skip  (before trl)
    from trl import SFTConfig, SFTTrainer

    changes = {} if job.side.checkpointing else {"gradient_checkpointing": False}
    return SFTTrainer(
        model=loaded.model,
        processing_class=loaded.tokenizer,
        train_dataset=dataset,
        args=_arguments(job, SFTConfig, **changes),
    )


def _load_pronghorn(job: Job, read: Callable[[], None]) -> Loaded:
    from pronghorn import FastLanguageModel

    loaded = _load_fast(job, FastLanguageModel, read)
    if job.side.attention is not None:
        from pronghorn.engine import binding_of

        binding = binding_of(loaded.model)
        assert binding is not None
        binding.attention = job.side.attention
    return loaded


def _pronghorn(job: Job, loaded: Loaded, dataset: Any) -> Any:
    from pronghorn import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=loaded.model,
        processing_class=loaded.tokenizer,
        train_dataset=dataset,
        # The adapter's save levels stay, and TRL's packing of whole documents is pronghorn's too.
        args=_arguments(job, SFTConfig, bf16=False),
    )
