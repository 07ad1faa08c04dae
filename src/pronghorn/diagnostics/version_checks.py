"""Versions that do not go together, by name: packages and their ranges, torch and the driver, torch and the GPU.

What is found (`Build`, `gpu_driver`) and what is judged of it (`judge_…`) are apart, so that a test can judge machines
it does not have.
"""

from __future__ import annotations

import ctypes
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from pronghorn.diagnostics.checks import NotHere, Unsound

_SELECTOR = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Build:
    """What torch was built for, and what it met.

    `cuda` is the version torch was built with, None for a CPU build; `driver_cuda` the newest one the driver runs, None
    without a driver; `card` what shows that an NVIDIA card is there; `available` whether torch can use it.
    """

    torch: str
    cuda: str | None
    hip: str | None
    driver: str | None
    driver_cuda: tuple[int, int] | None
    card: str | None
    available: bool


# --- packages ------------------------------------------------------------------------------------------------------


def requirements() -> dict[str, str]:
    """Version ranges of the packages this library names, optional ones included, by package."""
    lines = _declared()
    found = {}
    for line in lines:
        requirement = line.partition(";")[0]
        matched = re.match(r"^([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*(.*)$", requirement.strip())
        if matched and matched[2] and matched[1] != "pronghorn":
            found[matched[1]] = matched[2].strip("() ")
    return found


def _declared() -> list[str]:
    try:
        return list(requires("pronghorn") or [])
    except PackageNotFoundError:
        source = Path(__file__).resolve().parents[3] / "pyproject.toml"  # run from its sources
        if not source.is_file():
            return []
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        wanted = [
            line for group in ("gpu", "gguf", "hopper") for line in project["optional-dependencies"][group]
        ]
        return [*project["dependencies"], *wanted]


def package_versions() -> str:
    installed = {}
    ranges = requirements()
    for name in ranges:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return judge_packages(ranges, installed)


def judge_packages(ranges: Mapping[str, str], installed: Mapping[str, str]) -> str:
    """All installed packages are in the ranges this library works with.

    Raises:
        Unsound: with each that is not.
    """
    from packaging.specifiers import SpecifierSet

    wrong = [
        name
        for name, number in installed.items()
        if name in ranges
        and not SpecifierSet(ranges[name]).contains(number.partition("+")[0], prereleases=True)
    ]
    if wrong:
        raise Unsound(
            "; ".join(f"{name} {installed[name]} is outside of {ranges[name]}" for name in wrong),
            "pip install " + " ".join(f"'{name}{ranges[name]}'" for name in wrong),
        )
    shown = ("torch", "transformers", "trl", "peft")
    return ", ".join(f"{name} {installed[name]}" for name in shown if name in installed) + " are in range"


# --- torch, the driver, the card -------------------------------------------------------------------------------------


def build() -> Build:
    import torch

    driver, driver_cuda = gpu_driver()
    return Build(
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        driver=driver,
        driver_cuda=driver_cuda,
        card=nvidia_card(),
        available=torch.cuda.is_available(),
    )


def nvidia_card() -> str | None:
    """What shows that the machine has an NVIDIA card, whatever torch sees; None when nothing does."""
    if Path("/proc/driver/nvidia/version").exists():
        return "the NVIDIA driver is loaded"
    if Path("/dev/nvidia0").exists():
        return "there is /dev/nvidia0"
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        try:
            made_by_nvidia = vendor.read_text().strip() == "0x10de"
            is_display = vendor.with_name("class").read_text().startswith("0x03")
        except OSError:
            continue
        if made_by_nvidia and is_display:
            return f"PCI device {vendor.parent.name} is an NVIDIA card"
    return None


def gpu_driver() -> tuple[str | None, tuple[int, int] | None]:
    """The NVIDIA driver's version, and the newest CUDA it runs; None for what cannot be found out."""
    name = None
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        matched = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", text)
        name = matched[1] if matched else None
    except OSError:
        name = None
    try:
        library = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
            return name, (number.value // 1000, number.value % 1000 // 10)
    except (OSError, AttributeError):
        return name, None
    return name, None


def torch_build() -> str:
    return judge_build(build())


def judge_build(found: Build) -> str:
    """torch is one that can use the card that is there.

    Raises:
        Unsound: a CPU build beside an NVIDIA card.
    """
    if found.cuda is None and found.hip is None:
        if found.card is not None:
            raise Unsound(
                f"torch {found.torch} is built for the CPU alone, but {found.card}",
                f"install the CUDA build: {_SELECTOR}",
            )
        return f"torch {found.torch} for the CPU; no NVIDIA card is seen"
    if found.hip is not None:
        return f"torch {found.torch} for ROCm {found.hip}"
    if found.card is None:
        return f"torch {found.torch} for CUDA {found.cuda}; no NVIDIA card is seen"
    return f"torch {found.torch} for CUDA {found.cuda}"


def nvidia_driver() -> str:
    return judge_driver(build())


def judge_driver(found: Build) -> str:
    """The driver runs programs of the CUDA that torch was built with: of its major version, or a newer driver.

    Raises:
        NotHere: there is no NVIDIA card, or torch is not for one.
        Unsound: the driver is older, missing, or does not work.
    """
    if found.cuda is None:
        raise NotHere("torch is not built for CUDA")
    if found.card is None and found.driver_cuda is None:
        raise NotHere("no NVIDIA card is seen")
    wanted = tuple(int(part) for part in found.cuda.split(".")[:2])
    named = f"driver {found.driver}" if found.driver else "the driver"
    if found.driver_cuda is None:
        raise Unsound(
            f"{found.card}, but libcuda.so.1, a part of the driver, cannot be loaded",
            "install the driver; in a container start it with --gpus all (nvidia-container-toolkit)",
        )
    runs = "{}.{}".format(*found.driver_cuda)
    if found.driver_cuda[0] < wanted[0]:
        raise Unsound(
            f"{named} runs CUDA up to {runs}, and torch {found.torch} is built for CUDA {found.cuda}",
            f"update the driver, or install torch for CUDA {found.driver_cuda[0]}: {_SELECTOR}",
        )
    if not found.available:
        raise Unsound(
            f"{named} runs CUDA up to {runs}, torch {found.torch} is built for {found.cuda}, and yet torch sees no GPU",
            "look at CUDA_VISIBLE_DEVICES and nvidia-smi; after an update of the driver restart the machine",
        )
    older = found.driver_cuda < wanted
    note = "; kernels compiled by newer tools may be refused: update the driver if so" if older else ""
    return f"{named} runs CUDA up to {runs}, torch is built for {found.cuda}{note}"


def gpu_architecture() -> str:
    import torch

    if not torch.cuda.is_available():
        raise NotHere("no CUDA GPU")
    if torch.version.hip:
        raise NotHere("ROCm")
    names = []
    for index in range(torch.cuda.device_count()):
        judge_architecture(
            torch.cuda.get_device_capability(index), torch.cuda.get_arch_list(), torch.__version__
        )
        names.append("{}.{}".format(*torch.cuda.get_device_capability(index)))
    return f"compute capability {', '.join(sorted(set(names)))} is among those torch is built for"


def judge_architecture(capability: tuple[int, int], built_for: list[str], torch_version: str) -> str:
    """Binary code runs on its own major version from its minor on; what is there as PTX runs on everything newer.

    Raises:
        Unsound: torch has no code for this GPU.
    """
    for name in built_for:
        matched = re.match(r"^(sm|compute)_(\d+?)(\d)([af]?)$", name)
        if matched is None:
            continue
        has = (int(matched[2]), int(matched[3]))
        # Code for sm_90a runs on 9.0 alone.
        runs = has == capability if matched[4] else has[0] == capability[0] and has[1] <= capability[1]
        if matched[1] == "sm" and runs:
            return name
        if matched[1] == "compute" and has <= capability:
            return name
    have = ", ".join(built_for) or "none"
    raise Unsound(
        f"torch {torch_version} has no code for compute capability {capability[0]}.{capability[1]} (it has {have})",
        f"install a torch built for this GPU: {_SELECTOR}"
        + (" (GPUs before 7.0 need an older release)" if capability < (7, 0) else ""),
    )


# --- Triton and bitsandbytes ---------------------------------------------------------------------------------------


def triton_version() -> str:
    import torch

    if not torch.cuda.is_available():
        raise NotHere("no CUDA GPU: kernels run as torch")
    try:
        installed = version("triton")
    except PackageNotFoundError:
        installed = None
    return judge_triton(installed, _triton_of_torch(), torch.cuda.get_device_capability())


def _triton_of_torch() -> str | None:
    """The range of Triton versions that torch asks for, as in its package's metadata."""
    for line in requires("torch") or []:
        matched = re.match(r"^triton\s*\(?([=<>!~][^;)]*)", line)
        if matched:
            return matched[1].strip()
    return None


def judge_triton(installed: str | None, wanted: str | None, capability: tuple[int, int]) -> str:
    """Triton is there, is the one torch was released with, and compiles for this GPU.

    Raises:
        Unsound: it is missing, or another one.
        NotHere: the GPU is older than what Triton compiles for.
    """
    from packaging.specifiers import SpecifierSet

    if capability < (7, 0):
        raise NotHere("Triton compiles from compute capability 7.0 on: kernels run as torch")
    if installed is None:
        named = f"'triton{wanted}'" if wanted else "triton"
        raise Unsound("triton is not installed: kernels run as plain torch, slower", f"pip install {named}")
    if wanted and not SpecifierSet(wanted).contains(installed.partition("+")[0], prereleases=True):
        raise Unsound(
            f"triton {installed} is installed, and torch asks for {wanted}", f"pip install 'triton{wanted}'"
        )
    return f"triton {installed}" + (f", as torch asks ({wanted})" if wanted else "")


def bitsandbytes_library() -> str:
    """The part of bitsandbytes that is no Python is there for this CUDA."""
    if find_spec("bitsandbytes") is None:
        raise NotHere(
            "bitsandbytes is not installed", "pip install 'bitsandbytes>=0.50' for 4-bit and 8-bit weights"
        )
    import bitsandbytes
    import torch
    from bitsandbytes.cextension import lib

    if "Mock" in type(lib).__name__:
        cuda = torch.version.cuda
        raise Unsound(
            f"bitsandbytes {bitsandbytes.__version__} has no library for CUDA {cuda}",
            "pip install -U bitsandbytes (python -m bitsandbytes says more)",
        )
    return f"bitsandbytes {bitsandbytes.__version__}, its library is loaded"
