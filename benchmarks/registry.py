"""What is compared: workloads (a model, a batch shape, a precision) and sides (a library with its settings)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.models import with_layers

#: every ratio in a table is against this side
BASELINE = "unsloth"

Lengths = Literal["fixed", "mixed", "alpaca"]


@dataclass(frozen=True)
class Workload:
    """One training job, the same for every side.

    Attributes:
        model: key of `benchmarks.models.CONFIGS`.
        rows: sequences a micro-batch. accumulation: micro-batches a step.
        length: tokens a sequence; with other lengths than fixed ones, the longest.
        four_bit: NF4 base weights.
        warmup, steps: optimizer steps before and inside the timed region.
        lengths: all `length`; or a distribution of `benchmarks.rows`. "alpaca" also leaves prompts unsupervised.
        packed_rows: full rows a micro-batch of a side that packs.
        cpu: may be timed without a GPU.
        cap_gib: the process may hold so much device memory.
        dtype: of the weights; None is bfloat16 on a GPU and what the library takes by itself on a CPU.
    """

    name: str
    model: str
    rows: int
    length: int
    four_bit: bool = False
    warmup: int = 4
    steps: int = 10
    rank: int = 16
    lengths: Lengths = "fixed"
    accumulation: int = 1
    packed_rows: int = 2
    cpu: bool = False
    cap_gib: float | None = None
    dtype: str | None = None

    @property
    def label(self) -> str:
        """NF4 storage is `quantised`; all else only reorders sums."""
        return "quantised (NF4)" if self.four_bit else "exact"

    @property
    def mixed(self) -> bool:
        return self.lengths != "fixed"

    @property
    def shape(self) -> str:
        """The batch in words: 4x2048, or with accumulation and a distribution of lengths."""
        times = f"{self.accumulation}x" if self.accumulation > 1 else ""
        rows = f"{times}{self.rows} rows of {self.lengths} lengths up to {self.length}"
        return rows if self.mixed else f"{times}{self.rows}x{self.length}"


@dataclass(frozen=True)
class Side:
    """A library with its settings.

    Attributes:
        library: whose loader and trainer run: hf, liger, unsloth or pronghorn.
        checkpointing: True/False as in Transformers; "unsloth"; a pronghorn save level; None leaves it to the library.
        packing: the library's own packing of short rows.
        batch: (rows a micro-batch, micro-batches a step) instead of the workload's.
        attention: pronghorn's attention implementation by name; None is the fastest.
        note: a plain description for the table.
        load, adapter, train: further arguments of the loader, of the adapter and of the trainer's configuration.
    """

    name: str
    library: Literal["hf", "liger", "unsloth", "pronghorn"]
    checkpointing: bool | str | None
    packing: bool = False
    batch: tuple[int, int] | None = None
    attention: str | None = None
    note: str = ""
    load: Mapping[str, Any] = field(default_factory=dict, hash=False)
    adapter: Mapping[str, Any] = field(default_factory=dict, hash=False)
    train: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def eight_bit(self) -> str | None:
        """ "fp8" or "int8" where products are made of 8-bit codes."""
        return next((kind for kind in ("fp8", "int8") if self.load.get(f"load_in_{kind}")), None)

    def gates(self, workload: Workload) -> str:
        """How `benchmarks.gates` calls the mode of a side that multiplies 8-bit codes."""
        kind = self.load.get("load_in_fp8")
        name = "int8" if self.eight_bit == "int8" else "fp8" if kind is True else f"fp8-{kind}"
        name = f"nf4-{name}" if workload.four_bit else name
        settings = ("fp8_skip_layers", "fp8_modules", "int8_skip_layers", "int8_modules")
        others = {key: value for key, value in self.load.items() if key in settings}
        if self.load.get("int8_copies") == 1:  # the input gradient is rounded another way
            others["int8_copies"] = 1
        return " ".join([name, *(f"{key}={value}" for key, value in others.items())])

    def label(self, workload: Workload) -> str:
        """What is rounded beyond the stock model's computing: nothing (exact), or storage and products (quantised)."""
        if self.eight_bit is None:
            return workload.label
        kinds = (["NF4"] if workload.four_bit else []) + [self.eight_bit.upper()]
        return f"quantised ({', '.join(kinds)})"


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
    Workload("qwen1.5b-mixed", "qwen2.5-1.5b", rows=16, length=1024, warmup=6, steps=40, lengths="mixed"),
    Workload("gemma2-2b-lora", "gemma-2-2b", rows=4, length=2048, warmup=6, steps=20),
    Workload("gemma3-4b-lora", "gemma-3-4b", rows=4, length=2048, warmup=6, steps=20),
    Workload("qwen3moe-lora", "qwen3-30b-a3b-12-layers", rows=4, length=2048),
    Workload("qwen3moe-whole-lora", "qwen3-30b-a3b", rows=4, length=2048, warmup=2, steps=8),
    Workload("qwen3moe-qlora", "qwen3-30b-a3b-12-layers", rows=4, length=2048, four_bit=True),
    # Two rows four times a step is what Unsloth's notebooks train Alpaca with.
    Workload("alpaca", "llama-3.1-8b", 2, 2048, warmup=8, steps=25, lengths="alpaca", accumulation=4),
    Workload("alpaca-1.5b", "qwen2.5-1.5b", 2, 2048, warmup=8, steps=40, lengths="alpaca", accumulation=4),
    Workload("smollm-lora", "smollm2-135m", rows=4, length=256, warmup=2, steps=8, cpu=True),
    Workload("smollm-cpu", "smollm2-135m", rows=4, length=256, warmup=1, steps=7, cpu=True),
    Workload("smollm-cpu-fp32", "smollm2-135m", 4, 256, warmup=1, steps=5, cpu=True, dtype="float32"),
    Workload("tiny", "tiny", rows=2, length=32, warmup=1, steps=2, rank=4, cpu=True),
    Workload("tiny-alpaca", "tiny", 2, 64, warmup=1, steps=2, rank=4, lengths="alpaca", accumulation=2, cpu=True),
    *(
        Workload(f"longest-{cap}gib", "llama-3.1-8b", 1, 4096, True, warmup=1, steps=2, cap_gib=cap)
        for cap in (8, 24, 80)
    ),
)  # fmt: skip

#: what a part of a side's name behind its library stands for
LEVELS = ("offload", "none", "offload-attention", "attention", "offload-matmuls", "matmuls", "all")
ATTENTION = ("cudnn", "flash", "flex", "sdpa")
BUDGET = re.compile(r"\d+(\.\d+)?GiB")
EIGHT_BIT_ARGUMENTS = {"skip": "skip_layers", "copies": "copies"}
EIGHT_BIT_NUMBER = re.compile(r"(skip|copies)(\d+)")
BATCH = re.compile(r"(\d+)x(\d+)")
#: in a workload's name
LAYERS = re.compile(r"(\d+)layers")


def parse_side(name: str) -> Side:
    """A side from its name: a library and settings between hyphens, in any order.

    | part                                 | of        | sets                                                   |
    |--------------------------------------|-----------|--------------------------------------------------------|
    | a save level (all, offload, …)       | pronghorn | what every layer keeps; without one, the default       |
    | 17.5GiB                              | pronghorn | `memory_budget`: the trainer plans within it           |
    | fp8, fp8-mixed, fp8-backward         | pronghorn | `load_in_fp8`: which products run in FP8               |
    | int8                                 | pronghorn | `load_in_int8`                                         |
    | skip0, copies2                       | pronghorn | `fp8_skip_layers`, `fp8_copies`; so for int8           |
    | eager                                | pronghorn | no CUDA graphs                                         |
    | cudnn, flash, flex, sdpa             | pronghorn | attention by name                                      |
    | tuned                                | unsloth   | no checkpointing                                       |
    | nockpt                               | hf, liger | no checkpointing                                       |
    | packing                              | any       | the library's packing                                  |
    | 16x1                                 | any       | rows a micro-batch x micro-batches a step              |

    Raises:
        ValueError: for a name with other parts.
    """
    library, *parts = name.split("-")
    if library not in ("hf", "liger", "unsloth", "pronghorn"):
        raise ValueError(f"'{library}' is no library: hf, liger, unsloth, pronghorn")
    defaults: dict[str, bool | str | None] = {"hf": True, "liger": True, "unsloth": "unsloth"}
    side = Side(name, library, defaults.get(library))  # type: ignore[arg-type]
    while parts:
        # Some levels are two words.
        pair = "-".join(parts[:2])
        part = pair if len(parts) > 1 and pair in LEVELS else parts[0]
        parts = parts[part.count("-") + 1 :]
        side = _with(side, part)
    return side


def _with(side: Side, part: str) -> Side:
    ours = side.library == "pronghorn"
    shape = BATCH.fullmatch(part)
    if part == "packing":
        return replace(side, packing=True)
    if shape is not None:
        return replace(side, batch=(int(shape[1]), int(shape[2])))
    if part == "nockpt" and side.library in ("hf", "liger"):
        return replace(side, checkpointing=False)
    if part == "tuned" and side.library == "unsloth":
        return replace(side, checkpointing=False)
    if ours and part in LEVELS:
        return replace(side, checkpointing=part)
    if ours and part in ATTENTION:
        return replace(side, attention=part)
    if ours and BUDGET.fullmatch(part):
        return replace(side, train={**side.train, "memory_budget": part})
    if ours and part == "fp8":
        return replace(side, load={**side.load, "load_in_fp8": True})
    if ours and part == "int8":
        return replace(side, load={**side.load, "load_in_int8": True})
    if ours and part in ("mixed", "backward") and side.eight_bit == "fp8":
        return replace(side, load={**side.load, "load_in_fp8": part})
    numbered = EIGHT_BIT_NUMBER.fullmatch(part)
    if ours and numbered is not None and side.eight_bit is not None:
        argument = f"{side.eight_bit}_{EIGHT_BIT_ARGUMENTS[numbered[1]]}"
        return replace(side, load={**side.load, argument: int(numbered[2])})
    if ours and part == "eager":
        return replace(side, train={**side.train, "cuda_graphs": False})
    raise ValueError(f"'{part}' says nothing about a side of {side.library}")


NOTES = {
    "hf": "Transformers, PEFT and TRL as they come (checkpointing on)",
    "hf-nockpt": "the same without checkpointing",
    "liger": "TRL with use_liger_kernel (checkpointing on)",
    "unsloth": "Unsloth's notebook settings",
    "unsloth-tuned": "Unsloth without checkpointing",
    "unsloth-packing": "Unsloth with its packing",
    "unsloth-tuned-packing": "Unsloth without checkpointing, with its packing",
    "pronghorn": "pronghorn's defaults",
    "pronghorn-offload": "layer inputs in host memory",
    "pronghorn-none": "layer inputs kept",
    "pronghorn-offload-attention": "the attention blocks' tensors in host memory",
    "pronghorn-attention": "the attention blocks' tensors kept",
    "pronghorn-offload-matmuls": "matrix products in host memory",
    "pronghorn-matmuls": "matrix products kept",
    "pronghorn-all": "nothing rebuilt",
    "pronghorn-all-eager": "nothing rebuilt, no CUDA graphs",
    "pronghorn-none-eager": "layer inputs kept, no CUDA graphs",
    "pronghorn-packing": "pronghorn's defaults with its packing",
    "pronghorn-all-packing": "nothing rebuilt, with packing",
    "pronghorn-17.5GiB": "planned within Unsloth's memory at 8B LoRA",
    "pronghorn-6.8GiB": "planned within Unsloth's memory at 8B QLoRA",
    "pronghorn-3.4GiB": "planned within Unsloth's memory at 1.5B LoRA",
    "pronghorn-int8": "frozen weights in INT8",
    "pronghorn-int8-all": "frozen weights in INT8, nothing rebuilt",
    "pronghorn-int8-none": "frozen weights in INT8, layer inputs kept",
    "pronghorn-int8-copies1-17.5GiB": "INT8 codes for one direction, planned within Unsloth's memory at 8B LoRA",
    "pronghorn-int8-17.5GiB": "frozen weights in INT8, planned within Unsloth's memory at 8B LoRA",
    "pronghorn-int8-130GiB": "INT8 products of 4-bit weights, codes kept where there is room",
    "pronghorn-int8-7.0GiB": "INT8 products of 4-bit weights, planned within Unsloth's memory at 8B QLoRA",
    "pronghorn-int8-packing": "frozen weights in INT8, with packing",
    "pronghorn-fp8": "frozen weights in FP8",
    "pronghorn-fp8-all": "frozen weights in FP8, nothing rebuilt",
    "pronghorn-fp8-none": "frozen weights in FP8, layer inputs kept",
    "pronghorn-fp8-all-eager": "frozen weights in FP8, nothing rebuilt, no CUDA graphs",
    "pronghorn-fp8-17.5GiB": "frozen weights in FP8, planned within Unsloth's memory at 8B LoRA",
    "pronghorn-fp8-6.8GiB": "FP8 products, planned within Unsloth's memory at 8B QLoRA",
    "pronghorn-fp8-mixed": "in FP8 where it costs little, and every input gradient",
    "pronghorn-fp8-backward": "weights in 16 bits, input gradients in FP8",
    "pronghorn-fp8-packing": "frozen weights in FP8, with packing",
}

#: the sides with a note; `parse_side` reads further names
SIDES: dict[str, Side] = {name: replace(parse_side(name), note=note) for name, note in NOTES.items()}

DEFAULT_SIDES = (
    "hf",
    "liger",
    "unsloth",
    "unsloth-tuned",
    "pronghorn",
    "pronghorn-none",
    "pronghorn-matmuls",
    "pronghorn-all",
)


def find_side(name: str) -> Side:
    """A known side, or one read from its name.

    Raises:
        SystemExit: for a name that says nothing, with the reason.
    """
    if name in SIDES:
        return SIDES[name]
    try:
        return parse_side(name)
    except ValueError as error:
        raise SystemExit(
            f"unknown side {name}: {error}; known: {', '.join(SIDES)}, and such as they"
        ) from None


def find_workload(name: str) -> Workload:
    """A known workload; "NAME@2x4096" is one with other rows and length, "NAME@2x4096@24" also with a memory cap,
    "NAME@4layers" one of a shallower model.

    Raises:
        SystemExit: for an unknown name, with the known ones.
    """
    known, *changes = name.split("@")
    if known not in WORKLOADS:
        raise SystemExit(f"unknown: {known}; known: {', '.join(WORKLOADS)}")
    workload = WORKLOADS[known]
    for change in changes:
        shape, layers = BATCH.fullmatch(change), LAYERS.fullmatch(change)
        if layers is not None:
            workload = replace(workload, name=name, model=with_layers(workload.model, int(layers[1])))
        elif shape is not None:
            workload = replace(workload, name=name, rows=int(shape[1]), length=int(shape[2]))
        else:
            workload = replace(workload, name=name, cap_gib=float(change))
    return workload


def split(names: str | None, known: Mapping[str, Any], default: tuple[str, ...]) -> list[str]:
    """Names from a comma-separated list ("all": every known one; None: the default)."""
    if names is None:
        return list(default)
    if names == "all":
        return list(known)
    return [name.strip() for name in names.split(",") if name.strip()]
