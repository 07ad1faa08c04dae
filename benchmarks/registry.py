"""What is compared: workloads (a model, a batch shape, a precision) and sides (a library with its settings)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: every ratio in a table is against this side
BASELINE = "unsloth"


@dataclass(frozen=True)
class Workload:
    """One training job, the same for every side.

    Attributes:
        model: key of `benchmarks.models.CONFIGS`.
        rows: sequences a step.
        length: tokens a sequence; with `mixed`, the longest.
        four_bit: NF4 base weights.
        warmup, steps: optimizer steps before and inside the timed region.
        mixed: sequence lengths as in instruction data (log-normal, median 110 tokens) instead of all `length`.
        cpu: may be timed without a GPU.
    """

    name: str
    model: str
    rows: int
    length: int
    four_bit: bool = False
    warmup: int = 4
    steps: int = 10
    rank: int = 16
    mixed: bool = False
    cpu: bool = False

    @property
    def label(self) -> str:
        """NF4 storage is `quantised`; all else only reorders sums."""
        return "quantised (NF4)" if self.four_bit else "exact"


@dataclass(frozen=True)
class Side:
    """A library with its settings.

    Attributes:
        library: whose loader and trainer run: hf, liger, unsloth or pronghorn.
        checkpointing: True/False as in Transformers; "unsloth"; or a pronghorn save level.
        packing: the library's own packing of short rows.
        note: a plain description for the table.
    """

    name: str
    library: Literal["hf", "liger", "unsloth", "pronghorn"]
    checkpointing: bool | str
    packing: bool = False
    note: str = ""


def _by_name(*items: Workload) -> dict[str, Workload]:
    return {item.name: item for item in items}


WORKLOADS = _by_name(
    Workload("llama8b-lora", "llama-3.1-8b", rows=4, length=2048),
    Workload("llama8b-qlora", "llama-3.1-8b", rows=2, length=2048, four_bit=True),
    Workload("llama1b-lora", "llama-3.2-1b", rows=4, length=2048, warmup=6, steps=30),
    Workload("qwen1.5b-lora", "qwen2.5-1.5b", rows=2, length=1024, warmup=6, steps=40),
    Workload("qwen1.5b-lora-4x2048", "qwen2.5-1.5b", rows=4, length=2048, warmup=6, steps=30),
    Workload("qwen1.5b-qlora", "qwen2.5-1.5b", rows=2, length=1024, four_bit=True, warmup=6, steps=40),
    Workload("qwen1.5b-qlora-4x2048", "qwen2.5-1.5b", rows=4, length=2048, four_bit=True, warmup=6, steps=20),
    Workload("qwen1.5b-mixed", "qwen2.5-1.5b", rows=16, length=1024, warmup=6, steps=40, mixed=True),
    Workload("smollm-lora", "smollm2-135m", rows=4, length=256, warmup=2, steps=8, cpu=True),
    Workload("tiny", "tiny", rows=2, length=32, warmup=1, steps=2, rank=4, cpu=True),
)

SIDES: dict[str, Side] = {
    side.name: side
    for side in (
        Side("hf", "hf", True, note="Transformers, PEFT and TRL as they come (checkpointing on)"),
        Side("hf-nockpt", "hf", False, note="the same without checkpointing"),
        Side("liger", "liger", True, note="TRL with use_liger_kernel (checkpointing on)"),
        Side("unsloth", "unsloth", "unsloth", note="Unsloth's notebook settings"),
        Side("unsloth-tuned", "unsloth", False, note="Unsloth without checkpointing"),
        Side("unsloth-packing", "unsloth", "unsloth", packing=True, note="Unsloth with its packing"),
        Side("pronghorn-offload", "pronghorn", "offload", note="layer inputs in host memory"),
        Side("pronghorn-none", "pronghorn", "none", note="layer inputs kept"),
        Side("pronghorn-attention", "pronghorn", "attention", note="attention outputs kept"),
        Side("pronghorn-matmuls", "pronghorn", "matmuls", note="matrix products kept"),
        Side("pronghorn-all", "pronghorn", "all", note="nothing rebuilt"),
        Side("pronghorn-packing", "pronghorn", "all", packing=True, note="nothing rebuilt, with its packing"),
    )
}

DEFAULT_SIDES = (
    "hf",
    "liger",
    "unsloth",
    "unsloth-tuned",
    "pronghorn-none",
    "pronghorn-matmuls",
    "pronghorn-all",
)


def pick(
    names: str | None, known: dict[str, Workload] | dict[str, Side], default: tuple[str, ...]
) -> list[str]:
    """Names from a comma-separated list ("all": every one; None: the default).

    Raises:
        SystemExit: for an unknown name, with the known ones.
    """
    if names is None:
        return list(default)
    if names == "all":
        return list(known)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return chosen
