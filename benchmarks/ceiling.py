"""What the matrix and attention rates of this machine, measured now, allow a workload at most.

    python -m benchmarks.ceiling --workload llama8b-lora

Counted are the products with frozen weights, forward and input gradient, the head on supervised rows, and attention;
nothing else: no adapters, norms, activations, optimizer, memory traffic, launches. So no exact implementation is
faster, and one at 90 % of it has little left to win. Each product runs back to back on random data for at least half
a second in its own shape (an idle GPU clocks higher than a busy one, and zeros draw less power). Where projections
can be one product or several, the faster way counts; of the attention implementations, the fastest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels import Sizes, sizes_of
from benchmarks.libraries import batch_shape
from benchmarks.models import CONFIGS
from benchmarks.registry import Side, Workload, find_side, find_workload
from benchmarks.rows import UNSUPERVISED, columns
from benchmarks.run import CEILING_PREFIX
from benchmarks.table import plain_table

E4M3 = torch.float8_e4m3fn
#: rows of the head that are multiplied at a time: their logits take 1 GiB at most
HEAD_ROWS = 4096


@dataclass(frozen=True)
class Product:
    """x [T, inputs] @ Wᵀ and dy [T, outputs] @ W of a frozen weight [outputs, inputs]."""

    name: str
    outputs: int
    inputs: int


@dataclass(frozen=True)
class Rate:
    """Milliseconds of one call and its rate."""

    ms: float
    tflops: float


def figure(tflops: float) -> str:
    return f"{tflops:.0f}" if tflops >= 10 else f"{tflops:.3f}"


@dataclass(frozen=True)
class Batch:
    """A step as the ceiling sees it: T tokens in documents, n supervised rows."""

    lengths: tuple[int, ...]
    supervised: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def batch_of(workload: Workload, side: Side) -> Batch:
    """All rows of a step as one stream without padding; of mixed lengths, as many as fill the packed rows."""
    rows, _ = batch_shape(workload, side)
    if not workload.mixed:
        lengths = (workload.length,) * rows
        return Batch(lengths, sum(lengths) - len(lengths))
    table = columns(4096, workload.length, 64, lengths=workload.lengths)
    room, chosen, supervised = workload.packed_rows * workload.length, [], 0
    for number, ids in enumerate(table["input_ids"]):
        if room < len(ids):
            break
        room -= len(ids)
        labels = table.get("labels", table["input_ids"])[number]
        supervised += sum(label != UNSUPERVISED for label in labels[1:])
        chosen.append(len(ids))
    return Batch(tuple(chosen), supervised)


def sustained(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Milliseconds of a call, repeated back to back for at least `seconds` after a warm-up."""
    for _ in range(3):
        call()
    first = _timed(call, 3, device) / 3
    count = max(3, int(seconds * 1e3 / max(first, 1e-3)) + 1)
    _timed(call, max(1, count // 5), device)
    return _timed(call, count, device) / count


def _timed(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Milliseconds of `count` calls."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


class Bench:
    """Measures products and attention of one batch size."""

    def __init__(self, tokens: int, device: torch.device, dtype: torch.dtype, seconds: float) -> None:
        self.tokens, self.device, self.dtype, self.seconds = tokens, device, dtype, seconds

    def rate(self, call: Callable[[], object], flops: float) -> Rate:
        ms = sustained(call, self.device, self.seconds)
        return Rate(ms, flops / ms / 1e9)

    def product(self, product: Product, backward: bool, rows: int | None = None) -> Rate:
        """x @ Wᵀ, or with `backward` dy @ W, in 16 bits (fp32 where the workload is)."""
        rows = rows or self.tokens
        width, out = (product.outputs, product.inputs) if backward else (product.inputs, product.outputs)
        x = random(rows, width, device=self.device, dtype=self.dtype)
        w = random(product.outputs, product.inputs, device=self.device, dtype=self.dtype)
        y = torch.empty(rows, out, device=self.device, dtype=self.dtype)
        right = w if backward else w.t()
        return self.rate(lambda: torch.mm(x, right, out=y), 2.0 * rows * product.inputs * product.outputs)

    def product_fp8(self, product: Product, backward: bool) -> Rate:
        """The same in e4m3 with a scale each row of both factors, fast accumulation, bf16 out; the input gradient
        multiplies a second copy, since the matrix units want both factors along the summed dimension."""
        width, out = (product.outputs, product.inputs) if backward else (product.inputs, product.outputs)
        x = random(self.tokens, width, device=self.device, dtype=torch.bfloat16).to(E4M3)
        w = random(out, width, device=self.device, dtype=torch.bfloat16).to(E4M3)
        row = torch.rand(self.tokens, 1, device=self.device) + 0.5
        column = torch.rand(1, out, device=self.device) + 0.5
        y = torch.empty(self.tokens, out, device=self.device, dtype=torch.bfloat16)

        def call() -> object:
            return torch._scaled_mm(
                x, w.t(), scale_a=row, scale_b=column, out_dtype=torch.bfloat16, use_fast_accum=True, out=y
            )

        return self.rate(call, 2.0 * self.tokens * product.inputs * product.outputs)

    def product_int8(self, product: Product, backward: bool) -> Rate:
        """The same in int8 with a scale each row of both factors, by the package's own kernel."""
        from pronghorn.kernels import int8

        width, out = (product.outputs, product.inputs) if backward else (product.inputs, product.outputs)
        left, right = (
            (
                torch.randint(-127, 128, (rows, width), device=self.device, dtype=torch.int8),
                torch.rand(rows, 1, device=self.device) + 0.5,
            )
            for rows in (self.tokens, out)
        )
        return self.rate(
            lambda: int8.product(left, right), 2.0 * self.tokens * product.inputs * product.outputs
        )

    def attention(self, sizes: Sizes, batch: Batch, backend: str) -> tuple[Rate, Rate]:
        """Forward and backward over the batch's documents."""
        from pronghorn.kernels.attention import (
            AttentionCall,
            Documents,
            attention_backward,
            attention_forward,
        )

        ends = torch.tensor((0, *batch.lengths), dtype=torch.int32, device=self.device).cumsum(0)
        docs = Documents(ends.to(torch.int32), max(batch.lengths), batch.lengths)
        call = AttentionCall(sizes.head_dim**-0.5, None, backend)
        q, dout = (
            random(batch.tokens, sizes.heads, sizes.head_dim, device=self.device, dtype=self.dtype)
            for _ in range(2)
        )
        k, v = (
            random(batch.tokens, sizes.kv_heads, sizes.head_dim, device=self.device, dtype=self.dtype)
            for _ in range(2)
        )
        # Causal: half of the pairs; 2 products forward, 5 backward.
        pairs = sum(length * (length + 1) / 2 for length in batch.lengths)
        flops = 4.0 * pairs * sizes.heads * sizes.head_dim
        forward = self.rate(lambda: attention_forward(q, k, v, docs, call), flops)
        out, lse = attention_forward(q, k, v, docs, call)
        backward = self.rate(lambda: attention_backward(dout, q, k, v, out, lse, docs, call), flops * 2.5)
        return forward, backward

    def copy_bandwidth(self, size: int = 1 << 30) -> float:
        """GB/s of a copy, read and written bytes."""
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        ms = sustained(lambda: target.copy_(source), self.device, self.seconds)
        return 2 * size / ms / 1e6


def products_of(sizes: Sizes) -> dict[str, list[Product]]:
    """A layer's groups of products: each group as one product, then as its parts."""
    query, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    hidden, inner = sizes.hidden, sizes.intermediate
    return {
        "qkv": [
            Product("q|k|v", query + 2 * kv, hidden),
            Product("q", query, hidden),
            Product("k", kv, hidden),
            Product("v", kv, hidden),
        ],
        "o": [Product("o", hidden, query)],
        "gate_up": [
            Product("gate|up", 2 * inner, hidden),
            Product("gate", inner, hidden),
            Product("up", inner, hidden),
        ],
        "down": [Product("down", hidden, inner)],
    }


@dataclass(frozen=True)
class Group:
    """Milliseconds of the faster way of a group's products."""

    forward: float
    backward: float


def measure_groups(
    bench: Bench, sizes: Sizes, eight_bit: str | None, lines: list[list[str]]
) -> dict[str, Group]:
    """Every group's milliseconds; a table row for every product."""
    kind = eight_bit or str(bench.dtype).removeprefix("torch.")
    run = {"fp8": bench.product_fp8, "int8": bench.product_int8}.get(kind, bench.product)
    known: dict[tuple[int, int, bool], Rate] = {}
    groups = {}
    for name, (whole, *parts) in products_of(sizes).items():
        best = []
        for backward in (False, True):
            for product in (whole, *parts):
                key = (product.outputs, product.inputs, backward)
                if key not in known:
                    known[key] = run(product, backward)
                rate = known[key]
                layout = "dy @ W" if backward else "x @ Wt"
                shape = f"{product.outputs}x{product.inputs}"
                lines.append(
                    [f"{kind} {product.name}", layout, shape, f"{rate.ms:.3f}", f"{figure(rate.tflops)}"]
                )
            together = known[whole.outputs, whole.inputs, backward].ms
            apart = sum(known[p.outputs, p.inputs, backward].ms for p in parts)
            best.append(min(together, apart) if parts else together)
        groups[name] = Group(*best)
    return groups


def measure_attention(
    bench: Bench, sizes: Sizes, batch: Batch, lines: list[list[str]]
) -> tuple[float, float, str]:
    """Milliseconds forward and backward of the fastest implementation, and its name."""
    from pronghorn.errors import PronghornError
    from pronghorn.kernels.attention import choose_backend

    found = []
    wanted = ("cudnn", "flash") if bench.device.type == "cuda" else ("cpu",)
    for backend in wanted:
        try:
            choose_backend(bench.device, bench.dtype, sizes.head_dim, wanted=backend)
            forward, backward = bench.attention(sizes, batch, backend)
        except (PronghornError, RuntimeError, ImportError) as error:
            lines.append([f"attention {backend}", "not here", str(error).splitlines()[0][:60], "", ""])
            continue
        for layout, rate in (("forward", forward), ("backward", backward)):
            shape = f"{sizes.heads}/{sizes.kv_heads}x{sizes.head_dim}"
            lines.append([f"attention {backend}", layout, shape, f"{rate.ms:.3f}", f"{figure(rate.tflops)}"])
        found.append((forward.ms, backward.ms, backend))
    if not found:
        raise SystemExit("no attention implementation runs here")
    return min(found, key=lambda item: item[0] + item[1])


@dataclass(frozen=True)
class Parts:
    """Milliseconds of a step."""

    forward: float
    backward: float
    attention_forward: float
    attention_backward: float
    head: float
    gate_up: float
    rebuilt: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.attention_forward + self.attention_backward + self.head


def parts_of(
    groups: dict[str, Group], attention: tuple[float, float, str], head: float, layers: int
) -> Parts:
    """Add up. The first layer's q, k, v need no input gradient: nothing below is trained."""
    forward = layers * sum(group.forward for group in groups.values())
    backward = layers * sum(group.backward for group in groups.values()) - groups["qkv"].backward
    return Parts(
        forward,
        backward,
        layers * attention[0],
        layers * attention[1],
        head,
        gate_up=layers * groups["gate_up"].forward,
        # The down product's output is in the next layer's input, which is kept.
        rebuilt=forward - layers * groups["down"].forward + layers * attention[0],
    )


def derivation(parts: Parts, name: str, tokens: int) -> str:
    """The sum in words."""
    return (
        f"{name}: products {parts.forward:.1f} forward + {parts.backward:.1f} input gradients, attention "
        f"{parts.attention_forward:.1f} + {parts.attention_backward:.1f}, head {parts.head:.1f} = {parts.total:.1f} "
        f"ms for {tokens} tokens; rebuilding gate and up costs {parts.gate_up:.1f}, everything {parts.rebuilt:.1f} more"
    )


def ceilings(parts: Parts, label: str, tokens: int) -> list[tuple[str, str, float]]:
    """(what, label, tokens/s). Sides are held to the one that has their own label: the one that rebuilds nothing."""
    kind = "fp8" if "FP8" in label else "int8" if "INT8" in label else "16-bit products"
    rebuilt = {"": 0.0, ", gate and up rebuilt": parts.gate_up, ", all rebuilt": parts.rebuilt}
    return [
        (kind + what, label + what, tokens / (parts.total + more) * 1e3) for what, more in rebuilt.items()
    ]


def eight_bit_kinds(workload: Workload, device: torch.device) -> list[str]:
    """The 8-bit products that a GPU makes, and pronghorn with this workload's storage."""
    if device.type != "cuda":
        return []
    kinds = ["fp8"] if torch.cuda.get_device_capability(device) >= (8, 9) else []
    return kinds if workload.four_bit else [*kinds, "int8"]


def measure(workload: Workload, device: torch.device, seconds: float) -> list[tuple[str, str, float]]:
    """Measure, print the derivation, return the ceilings."""
    sizes = sizes_of(workload.model)
    batch = batch_of(workload, find_side("pronghorn"))
    dtype = getattr(torch, workload.dtype or "bfloat16")
    bench = Bench(batch.tokens, device, dtype, seconds)
    layers = CONFIGS[workload.model]["num_hidden_layers"]
    lines: list[list[str]] = []
    attention = measure_attention(bench, sizes, batch, lines)
    head_rows = min(HEAD_ROWS, max(1, batch.supervised))
    head_product = Product("head", sizes.vocabulary, sizes.hidden)
    head = 0.0
    for backward in (False, True):
        rate = bench.product(head_product, backward, head_rows)
        lines.append(
            [
                "head",
                "dy @ W" if backward else "x @ Wt",
                f"{sizes.vocabulary}x{sizes.hidden}",
                f"{rate.ms:.3f}",
                f"{figure(rate.tflops)}",
            ]
        )
        head += rate.ms * batch.supervised / head_rows
    found, text = [], []
    for eight_bit in (None, *eight_bit_kinds(workload, device)):
        groups = measure_groups(bench, sizes, eight_bit, lines)
        parts = parts_of(groups, attention, head, layers)
        load = {f"load_in_{eight_bit}": True} if eight_bit else {}
        label = Side("", "pronghorn", None, load=load).label(workload)
        text.append(derivation(parts, label, batch.tokens))
        found += ceilings(parts, label, batch.tokens)
    bandwidth = bench.copy_bandwidth(1 << 30 if device.type == "cuda" else 1 << 24)
    print(plain_table((f"{batch.tokens} tokens", "", "shape", "ms", "TFLOP/s"), lines))
    print(
        f"attention: {attention[2]}; copies {bandwidth:,.0f} GB/s; {layers} layers, {batch.supervised} supervised rows"
    )
    print("\n".join(text))
    print("\n".join(f"ceiling, {name}: {speed:,.0f} tokens/s" for name, _, speed in found), flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceiling", description=__doc__)
    parser.add_argument("--workload", required=True, type=find_workload)
    parser.add_argument("--seconds", type=float, default=0.5, help="least time of each measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    found = measure(options.workload, torch.device(options.device), options.seconds)
    print(CEILING_PREFIX + json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
