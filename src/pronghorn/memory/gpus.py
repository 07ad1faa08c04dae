"""GPUs: what their data sheets say, and what a training step gets of it.

A plan's time needs sustained rates. On the H200 they are measured (docs/lab-notes.md); of every other GPU the data
sheet's figure is multiplied by a share that says where it comes from. Matrix rates are dense (without 2:4 sparsity) and
with fp32 accumulation, which for GeForce cards is half of the figure in advertisements. The int8 product of GPUs other
than Hopper is the kernel that reaches 840 of 1,979 TOP/s on the H200.
"""

from __future__ import annotations

from dataclasses import dataclass

_T, _G, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Rates:
    """What a GPU sustains: FLOP/s of 16-bit, e4m3 and int8 products, of attention forward and backward, bytes/s of its
    memory and of the link to the host (one direction)."""

    name: str
    matmul: float
    matmul_fp8: float
    matmul_int8: float
    attention: tuple[float, float]
    bandwidth: float
    link: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class Shares:
    """Of a data sheet's figure, what a step gets: of the rates of products in 16 bits, e4m3, int8, of the 16-bit rate
    in attention forward and backward, of the bandwidth; and where the shares come from."""

    matmul: float
    fp8: float
    int8: float
    attention: tuple[float, float]
    bandwidth: float
    reason: str


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        memory: GiB that a process sees, the driver's own share taken off.
        bandwidth: GB/s. bf16, fp16, fp8, int8: TFLOP/s of dense products; 0 where there are no such units.
        link: GB/s to the host, one direction, of the 64, 32 or 16 that PCIe 5, 4, 3 × 16 say.
        source: of the figures.
        note: what else is to be known.
    """

    name: str
    memory: float
    bandwidth: float
    bf16: float
    fp16: float
    fp8: float
    int8: float
    capability: tuple[int, int]
    link: float
    shares: Shares
    source: str
    note: str = ""

    @property
    def dtype(self) -> str:
        """The 16-bit format that its matrix units multiply."""
        return "bfloat16" if self.bf16 else "float16"

    @property
    def rates(self) -> Rates:
        """Data sheet × share. 8-bit products without units for them run as 16-bit ones."""
        wide, share = self.bf16 or self.fp16, self.shares
        return Rates(
            self.name,
            matmul=wide * _T * share.matmul,
            matmul_fp8=(self.fp8 * share.fp8 or wide * share.matmul) * _T,
            matmul_int8=(self.int8 * share.int8 or wide * share.matmul) * _T,
            attention=(wide * _T * share.attention[0], wide * _T * share.attention[1]),
            bandwidth=self.bandwidth * _G * share.bandwidth,
            link=self.link * _G,
            capability=self.capability,
        )


_HOPPER = Shares(0.687, 0.632, 0.682, (0.28, 0.233), 0.875, "measured on an H200")
_BLACKWELL = Shares(
    0.687, 0.632, 0.632, (0.18, 0.14), 0.875, "the H200's shares; FlashAttention-2's absolute rate + 50 %"
)
_A100 = Shares(
    0.74, 0.0, 0.69, (0.55, 0.42), 0.85, "FlashAttention-2's paper (2023) for attention; else assumed"
)
_GEFORCE = Shares(
    0.9, 0.85, 0.6, (0.79, 0.58), 0.88, "assumed: fp32 accumulation halves the units' rate, not their power"
)
_L40S = Shares(0.55, 0.48, 0.42, (0.41, 0.3), 0.87, "assumed: its power limit holds the matrix units back")
_SMALL = Shares(0.55, 0.5, 0.42, (0.45, 0.34), 0.84, "assumed: its power limit holds the matrix units back")
_NO_FLASH = Shares(
    0.5, 0.0, 0.45, (0.16, 0.1), 0.8, "assumed: no FlashAttention-2 before compute capability 8.0"
)

_GA102 = "NVIDIA Ampere GA102 whitepaper, appendix A"
_AD102 = "NVIDIA Ada whitepaper, appendix A"
_GB202 = "NVIDIA RTX Blackwell whitepaper, appendix A"
#: name, GiB, GB/s, bf16, fp16, fp8, int8, capability, link, shares, source
GPUS = (
    Gpu("T4", 14.7, 320, 0, 65, 0, 130, (7, 5), 11, _NO_FLASH, "NVIDIA T4 data sheet", "fp16 only"),
    Gpu("V100-16", 15.8, 900, 0, 125, 0, 0, (7, 0), 11, _NO_FLASH, "NVIDIA V100 data sheet (SXM2)",
        "fp16 only; torch builds for CUDA 13 leave it out"),
    Gpu("V100-32", 31.7, 900, 0, 125, 0, 0, (7, 0), 11, _NO_FLASH, "NVIDIA V100 data sheet (SXM2)",
        "fp16 only; torch builds for CUDA 13 leave it out"),
    Gpu("3090", 23.6, 936, 71, 71, 0, 284, (8, 6), 24, _GEFORCE, _GA102),
    Gpu("4090", 23.5, 1008, 165.2, 165.2, 330.3, 660.6, (8, 9), 24, _GEFORCE, _AD102),
    Gpu("5090", 31.4, 1792, 209.5, 209.5, 419, 838, (12, 0), 50, _GEFORCE, _GB202),
    Gpu("A10", 22.1, 600, 125, 125, 0, 250, (8, 6), 24, _SMALL, "NVIDIA A10 data sheet"),
    Gpu("L4", 22.2, 300, 121, 121, 242.5, 242.5, (8, 9), 12, _SMALL, "NVIDIA L4 data sheet, halved (sparse)"),
    Gpu("L40S", 44.5, 864, 362, 362, 733, 733, (8, 9), 24, _L40S, "NVIDIA L40S data sheet"),
    Gpu("A100-40", 39.4, 1555, 312, 312, 0, 624, (8, 0), 24, _A100, "NVIDIA A100 data sheet"),
    Gpu("A100-80", 79.2, 2039, 312, 312, 0, 624, (8, 0), 24, _A100, "NVIDIA A100 data sheet (SXM)",
        "the PCIe card has 1,935 GB/s"),
    Gpu("H100", 79.2, 3350, 989.4, 989.4, 1978.9, 1978.9, (9, 0), 55, _HOPPER, "NVIDIA H100 data sheet (SXM), halved",
        "the PCIe card has 2,000 GB/s and three quarters of the matrix rate"),
    Gpu("H200", 139.8, 4800, 989.4, 989.4, 1978.9, 1978.9, (9, 0), 55, _HOPPER, "NVIDIA H200 data sheet (SXM), halved"),
    Gpu("B200", 178.3, 7700, 2250, 2250, 4500, 4500, (10, 0), 55, _BLACKWELL, "NVIDIA HGX B200 data sheet, halved"),
)  # fmt: skip
#: FLOP/s of cuDNN's packed attention on Hopper, measured.
CUDNN_ATTENTION = (457 * _T, 346 * _T)


def gpu_of(name: str, memory_bytes: int | None = None) -> Gpu | None:
    """The GPU whose name is in `name`, as drivers or users write it; None for one that is not listed.

    Of one that comes in two sizes ("A100") it is the one that is named, else the one nearest to `memory_bytes`, else
    the smaller.
    """
    asked = name.lower().replace(" ", "").replace("_", "-").removesuffix("gb")
    sizes: dict[str, list[Gpu]] = {}
    for gpu in GPUS:
        sizes.setdefault(gpu.name.partition("-")[0], []).append(gpu)
    model = max((key for key in sizes if key.lower() in asked), key=len, default=None)
    if model is None:
        return None
    rest = asked.partition(model.lower())[2]
    named = [gpu for gpu in sizes[model] if gpu.name.partition("-")[2] and gpu.name.partition("-")[2] in rest]
    if named:
        return named[0]
    return min(sizes[model], key=lambda gpu: abs(gpu.memory * GIB - (memory_bytes or 0)))


def rates_of(name: str) -> Rates:
    """The rates of the GPU whose name contains a known one; a 4090's for one that is not listed."""
    found = gpu_of(name)
    return (found or next(gpu for gpu in GPUS if gpu.name == "4090")).rates
