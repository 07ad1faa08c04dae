"""What checks compare with: numbers drawn the same everywhere, and bounds that follow from roundings."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.diagnostics.checks import Unsound
from pronghorn.hardware import probe

#: One rounding to nearest is half a unit in the last place, doubled because a value just off a tie may fall either way.
#: fp32: arithmetic over rows of a few hundred elements.
_UNITS = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
#: what helps where a kernel is wrong
BROKEN = (
    "update or reinstall torch and triton (`pronghorn doctor --facts` lists them); if it stays, report it"
)


def device() -> torch.device:
    return torch.device(probe().device)


def dtypes() -> tuple[torch.dtype, ...]:
    """What kernels are checked in: the dtype models compute in here, and on a CPU fp32 and bf16."""
    if not probe().is_cuda:
        return torch.float32, torch.bfloat16
    return (getattr(torch, probe().compute_dtype.value),)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers on the device, the same on every device."""
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device(), dtype)


def excess(actual: Tensor, expected: Tensor, slack: float = 1.0) -> float:
    """max |actual - expected| / (slack · (u · |expected| + 4e-6 · max|expected|)), u of actual's dtype.

    The second term is cancellation: a small result of large terms carries the fp32 error of the large ones. NaN and
    wrong shapes are infinitely wrong.
    """
    if actual.shape != expected.shape:
        return float("inf")
    size = expected.double().abs()
    bound = _UNITS[actual.dtype] * size + 4e-6 * size.max().clamp(min=1e-6)
    if actual.dtype == torch.float16:
        bound = bound + 2.0**-24  # its smallest subnormal
    ratio = ((actual.double() - expected.double()).abs() / (slack * bound)).max().item()
    return float("inf") if ratio != ratio else ratio


class Comparison:
    """Collects how far results are from their references, in units of what rounding allows."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.compared: list[str] = []

    def near(self, name: str, actual: Tensor, expected: Tensor, slack: float = 1.0) -> None:
        """Hold a result to its reference within `slack` roundings.

        Raises:
            Unsound: naming the tensor and by how much it is off.
        """
        found = excess(actual, expected, slack)
        if not found <= 1.0:
            how = "no number or of a wrong shape" if found == float("inf") else f"off by {found:.3g} times"
            bound = "" if found == float("inf") else " what rounding allows"
            dtype = str(actual.dtype).removeprefix("torch.")
            raise Unsound(f"{name} in {dtype} is {how}{bound}", BROKEN)
        self.worst = max(self.worst, found)
        if name not in self.compared:
            self.compared.append(name)

    def __str__(self) -> str:
        return f"{', '.join(self.compared)}: at most {self.worst:.2f} of what rounding allows"


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in fp64; NaN is infinite."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def close(
    compared: Comparison,
    name: str,
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype | None = None,
    *,
    bound: float | None = None,
) -> None:
    """For sums of products whose factors are rounded to `dtype`: by the norm, four roundings of a factor allowed.

    Args:
        bound: another bound than that.

    Raises:
        Unsound: naming the tensor and how far it is off.
    """
    dtype = dtype or actual.dtype
    allowed = 4 * max(torch.finfo(dtype).eps / 2, 1e-6) if bound is None else bound
    found = relative(actual, expected)
    if not found <= allowed:
        kind = str(dtype).removeprefix("torch.")
        raise Unsound(f"{name} in {kind} is off by {found:.2e} of the norm, allowed {allowed:.1e}", BROKEN)
    compared.worst = max(compared.worst, found / allowed)
    if name not in compared.compared:
        compared.compared.append(name)
