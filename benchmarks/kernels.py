"""Each kernel alone: time, bandwidth against a plain copy's in the same run, and torch's eager time.

    python -m benchmarks.kernels [--shapes llama-3.1-8b,qwen2.5-1.5b]

"least bytes" counts every input read once and every output written once; the roofline is those bytes over the
bandwidth of a large device-to-device copy. Matrix-bound kernels are held to a plain bf16 product of the same sizes.
The L2 cache is flushed before every timed call.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import CONFIGS
from benchmarks.table import plain_table

TOKENS = {"llama-3.1-8b": 8192, "llama-3.2-1b": 8192, "qwen2.5-1.5b": 2048, "smollm2-135m": 1024, "tiny": 64}


@dataclass(frozen=True)
class Sizes:
    """T tokens, H hidden, I intermediate, N heads, K kv heads, D head size, V vocabulary."""

    name: str
    tokens: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


@dataclass(frozen=True)
class Measurement:
    """A kernel to time. `prepare` makes fresh inputs outside the clock, `call(inputs, impl)` is timed."""

    name: str
    prepare: Callable[[], Any]
    call: Callable[[Any, str | None], Any]
    least_bytes: float
    flops: float = 0.0


def sizes_of(name: str) -> Sizes:
    config = CONFIGS[name]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return Sizes(
        name, TOKENS[name], config["hidden_size"], config["intermediate_size"], heads,
        config["num_key_value_heads"], head_dim, config["vocab_size"],
    )  # fmt: skip


def time_ms(
    measurement: Measurement, impl: str | None, device: str, repeats: int = 20, warmup: int = 3
) -> float:
    """Median milliseconds of one call with a cold L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device == "cuda" else None
    times = []
    for repeat in range(warmup + repeats):
        inputs = measurement.prepare()
        if flush is None:
            begin = time.perf_counter()
            measurement.call(inputs, impl)
            elapsed = (time.perf_counter() - begin) * 1e3
        else:
            flush.zero_()
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # Work in the queue ahead of the kernel, so that the host's launch time stays out of the interval.
            torch.cuda._sleep(400_000)
            before.record()
            measurement.call(inputs, impl)
            after.record()
            torch.cuda.synchronize()
            elapsed = before.elapsed_time(after)
        if repeat >= warmup:
            times.append(elapsed)
    return median(times)


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy, read and written bytes both counted."""
    size = (1 << 30) if device == "cuda" else (1 << 26)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = Measurement("copy", lambda: None, lambda _, __: target.copy_(source), 2 * size)
    return 2 * size / (time_ms(copying, None, device) * 1e-3)


def product_rate(sizes: Sizes, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the plain product hidden @ weight.T of the head."""
    hidden = torch.randn(sizes.tokens, sizes.hidden, device=device, dtype=dtype)
    weight = torch.randn(sizes.vocabulary, sizes.hidden, device=device, dtype=dtype)
    product = Measurement("product", lambda: None, lambda _, __: hidden @ weight.T, 0.0)
    return 2.0 * sizes.tokens * sizes.hidden * sizes.vocabulary / (time_ms(product, None, device) * 1e-3)


def elementwise(s: Sizes, device: str, dtype: torch.dtype) -> Iterator[Measurement]:
    """RMSNorm, RoPE and GLU, forward and backward, as the blocks call them."""
    from pronghorn.kernels.glu import glu_backward, glu_forward
    from pronghorn.kernels.rms_norm import rms_norm_backward, rms_norm_forward
    from pronghorn.kernels.rope import qk_rope_backward, qk_rope_forward

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    element = dtype.itemsize
    x, other, gradient = draw(s.tokens, s.hidden), draw(s.tokens, s.hidden), draw(s.tokens, s.hidden)
    weight, rstd = draw(s.hidden), torch.rand(s.tokens, device=device)
    stream = s.tokens * s.hidden * element
    yield Measurement(
        "rms_norm forward",
        lambda: None,
        lambda _, impl: rms_norm_forward(x, weight, 1e-5, impl=impl),
        2 * stream,
    )
    yield Measurement(
        "rms_norm forward + residual",
        lambda: None,
        lambda _, impl: rms_norm_forward(x, weight, 1e-5, residual=other, impl=impl),
        4 * stream,
    )
    yield Measurement(
        "rms_norm backward + residual",
        lambda: None,
        lambda _, impl: rms_norm_backward(
            gradient, x, weight, rstd, eps=1e-5, residual_grad=other, impl=impl
        ),
        4 * stream,
    )
    q, k = draw(s.tokens, s.heads, s.head_dim), draw(s.tokens, s.kv_heads, s.head_dim)
    angle = torch.rand(s.tokens, s.head_dim, device=device) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    rotated = 2 * (q.numel() + k.numel()) * element + 2 * cos.numel() * element
    for name, function in (("forward", qk_rope_forward), ("backward", qk_rope_backward)):
        yield Measurement(
            f"qk_rope {name}",
            lambda: None,
            lambda _, impl, function=function: function(q, k, cos, sin, inplace=True, impl=impl),
            rotated,
        )
    wide = draw(s.tokens, 2 * s.intermediate)
    dact = draw(s.tokens, s.intermediate)
    inner = s.tokens * s.intermediate * element
    gate, up = wide[:, : s.intermediate], wide[:, s.intermediate :]
    yield Measurement(
        "glu forward", lambda: None, lambda _, impl: glu_forward(gate, up, "silu", impl=impl), 3 * inner
    )
    yield Measurement(
        "glu backward in place",
        lambda: (dact.clone(), wide.clone()),  # it writes over its inputs
        lambda given, impl: glu_backward(
            given[0],
            given[1][:, : s.intermediate],
            given[1][:, s.intermediate :],
            "silu",
            inplace=True,
            impl=impl,
        ),
        6 * inner,
    )


def head(s: Sizes, device: str, dtype: torch.dtype) -> Iterator[Measurement]:
    """Loss with the head's product, frozen head: two products forward and backward."""
    from pronghorn.kernels.linear_cross_entropy import linear_cross_entropy

    hidden = torch.randn(s.tokens, s.hidden, device=device, dtype=dtype)
    weight = torch.randn(s.vocabulary, s.hidden, device=device, dtype=dtype) * s.hidden**-0.5
    labels = torch.randint(0, s.vocabulary, (s.tokens,), device=device)

    def run(inputs: Tensor, impl: str | None) -> None:
        loss, _ = linear_cross_entropy(inputs, weight, labels, impl=impl)
        loss.backward()

    yield Measurement(
        "linear_cross_entropy f+b",
        lambda: hidden.detach().clone().requires_grad_(),
        run,
        (weight.numel() + 2 * hidden.numel()) * dtype.itemsize,
        4.0 * s.tokens * s.hidden * s.vocabulary,
    )


def quantised(s: Sizes, device: str, dtype: torch.dtype) -> Iterator[Measurement]:
    """NF4 to 16 bits, doubly quantised scales, the gate projection's weight."""
    from pronghorn.kernels.nf4 import FourBits, dequantize_4bit

    shape = (s.intermediate, s.hidden)
    count, blocks = shape[0] * shape[1], shape[0] * shape[1] // 64
    packed = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, device=device)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    code = torch.linspace(-1, 1, 16, device=device)
    nested = (
        torch.linspace(-1, 1, 256, device=device),
        torch.rand(-(-blocks // 256), device=device),
        torch.tensor(0.5, device=device),
        256,
    )
    bits = FourBits(packed, absmax, code, 64, shape, nested)
    yield Measurement(
        "dequantize_4bit, double",
        lambda: None,
        lambda _, impl: dequantize_4bit(bits, dtype, impl=impl),
        count * (0.5 + dtype.itemsize) + blocks,
    )


HEADER = ("kernel", "ms", "torch ms", "speedup", "GB/s", "of copy", "TFLOP/s", "of product")


def rows_for(sizes: Sizes, device: str, dtype: torch.dtype, repeats: int) -> list[list[str]]:
    """One table row a kernel; a kernel that fails gives its reason instead."""
    bandwidth, rate = copy_bandwidth(device), product_rate(sizes, device, dtype)
    rows = []
    for group in (elementwise, head, quantised):
        for measurement in group(sizes, device, dtype):
            try:
                ours = time_ms(measurement, None, device, repeats)
                eager = time_ms(measurement, "torch", device, max(3, repeats // 4), 1)
            except Exception as error:  # one kernel's failure is a line of the table
                rows.append([measurement.name, "failed", *[""] * 6])
                print(f"{measurement.name}: {type(error).__name__}: {error}", flush=True)
                continue
            speed, flops = measurement.least_bytes / (ours * 1e-3), measurement.flops / (ours * 1e-3)
            matrix = [f"{flops / 1e12:.1f}", f"{flops / rate:.0%}"] if flops else ["", ""]
            memory = ["", ""] if flops else [f"{speed / 1e9:,.0f}", f"{speed / bandwidth:.0%}"]
            rows.append(
                [measurement.name, f"{ours:.3f}", f"{eager:.3f}", f"{eager / ours:.1f}x", *memory, *matrix]
            )
    return rows


def main(argv: list[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--shapes", default="llama-3.1-8b,qwen2.5-1.5b" if on_gpu else "tiny")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(argv)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    failed = False
    for name in options.shapes.split(","):
        sizes = sizes_of(name)
        rows = rows_for(sizes, options.device, dtype, options.repeats)
        failed = failed or any(row[1] == "failed" for row in rows)
        print(f"\n{name}, T={sizes.tokens}, {dtype}\n{plain_table(HEADER, rows)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
