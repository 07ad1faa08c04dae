"""How long a training step takes, from operation and byte counts and a GPU's measured rates.

Good enough to rank plans: what matters is the ratio of matrix rate, memory bandwidth and link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pronghorn.blocks import Level, host_bytes_per_token, keeps
from pronghorn.blocks.glu import TILE_ROWS
from pronghorn.blocks.head_groups import head_groups
from pronghorn.blocks.long_rows import makes_heads_again
from pronghorn.kernels.linear_cross_entropy import Space, default_chunk_rows
from pronghorn.memory.gpus import CUDNN_ATTENTION, Rates
from pronghorn.memory.long_rows import splits
from pronghorn.memory.offload import bytes_in_flight, comes_late
from pronghorn.memory.products import DOWN, GATE_UP, OUT, QKV
from pronghorn.memory.schedule import Batch
from pronghorn.memory.shape import ModelShape

#: Of the rate of dense products, what grouped ones get with the adapters' narrow products (Qwen3-30B-A3B's shapes on an
#: H200: 490 of 660 TFLOP/s).
GROUPED_SHARE = 0.75
#: Passes over the rule's output [T, N·F] that the gated delta rule and its convolution take as long as, forward and
#: backward; a guess.
RULE_PASSES = (45, 120)
#: Of the bandwidth of plain kernels, what unpacking NF4 reaches (docs/lab-notes.md).
UNPACKED = 0.59
#: The same where int8 codes are made of NF4, turned and rounded on the way. Not measured alone: it is fitted to one run
#: (8B, 2×2048 within 7 GiB, 258 ms), as what the other terms leave of it.
UNPACKED_TO_INT8 = 0.135
#: Launches and shorter products of a further tile, forward and backward together; a guess.
TILE_SECONDS = 100e-6


@dataclass(frozen=True)
class LayerTimes:
    """Seconds one layer computes: forward, backward without rebuilding, what each depth has to rebuild, a whole forward
    once more, what each tile of the GLU block beyond the first adds, and making q, k and v of a long row again."""

    forward: float
    backward: float
    rebuild_attention: float
    rebuild_glu: float
    rebuild_norms: float
    full_rebuild: float
    per_tile: float
    heads_again: float = 0.0

    def rebuild(self, level: Level) -> float:
        """Seconds of recomputation in backward at a save level."""
        total = 0.0
        if not keeps(level, "attention"):
            total += self.rebuild_attention
        if not keeps(level, "matmuls"):
            total += self.rebuild_glu
        if not keeps(level, "all"):
            total += self.rebuild_norms
        return total


@dataclass(frozen=True)
class _Operations:
    """Seconds of single operations of one layer of `shape`, for a batch."""

    shape: ModelShape
    batch: Batch
    rates: Rates

    def product(self, *names: str, backward: bool = False) -> float:
        """Frozen products, adapters (they read and write the tall matrices once more), dequantisation; `backward`: of
        the input gradient."""
        shape, rates, t = self.shape, self.rates, self.batch.tokens
        fp8 = shape.fp8_backward if backward else shape.fp8_forward
        rate = rates.matmul_int8 if shape.int8 else rates.matmul_fp8 if fp8 else rates.matmul
        # A mixture's experts are multiplied in 16 bits.
        stacked = [name for name in names if shape.mixture is not None and name in (*GATE_UP, *DOWN)]
        wide = [name for name in names if name in shape.in_16_bits]
        linear = [name for name in names if name not in (*stacked, *wide)]
        flop = 2.0 * t * shape.linear_parameters(*linear) / rate
        flop += 2.0 * t * shape.linear_parameters(*wide) / rates.matmul
        flop += 2.0 * t * shape.linear_parameters(*stacked) / (GROUPED_SHARE * rates.matmul)
        # An int8 product adds the adapter's share where it writes, so that only its input is read once more.
        tall = [
            shape.linear(name)[1] if shape.int8 else sum(shape.linear(name))
            for name in names
            if shape.ranks.get(name)
        ]
        adapted = sum(tall) * shape.element * t / rates.bandwidth
        return flop + adapted + self.unpack(*names, backward=backward)

    def unpack(self, *names: str, backward: bool = False) -> float:
        """4-bit weights read and written as what is multiplied; also of a single set of 8-bit codes, transposed."""
        shape, rates = self.shape, self.rates
        size = shape.unpacked_backward if backward else shape.unpacked_forward
        if not size:
            return 0.0
        wide = [name for name in names if name in shape.in_16_bits]
        others = shape.linear_parameters(*(name for name in names if name not in wide))
        share = UNPACKED_TO_INT8 if shape.four_bit_in_int8 else UNPACKED
        seconds = others * (size + 0.5) / (share * rates.bandwidth)
        return seconds + shape.linear_parameters(*wide) * (shape.element + 0.5) / (UNPACKED * rates.bandwidth)

    def unpack_of_long_rows(self) -> float:
        """What a further tile of rows that go apart unpacks besides: o forward, rebuilding, and q, k, v back."""
        if not splits(self.shape, self.batch.tokens, "none"):
            return 0.0
        return 2 * self.unpack(*OUT) + self.unpack(*QKV, backward=True)

    def heads_again(self) -> float:
        """Making q, k and v of a long row again by groups of heads; with norms of them once more for their backward."""
        shape, t = self.shape, self.batch.tokens
        if not splits(shape, t, "none"):
            return 0.0
        groups = head_groups(t, shape.kv_heads, shape.attention)
        times, heads = 1 + shape.qk_norm, shape.q + 2 * shape.kv
        return times * self.product(*QKV) + groups * self.passes(3 * shape.hidden) + self.passes(2 * heads)

    def passes(self, elements: int) -> float:
        """Reading or writing so many elements a token."""
        return elements * self.batch.tokens * self.shape.element / self.rates.bandwidth

    def attention(self) -> tuple[float, float]:
        """Attention itself, forward and backward; of the gated delta rule, where layers have that."""
        shape, t = self.shape, self.batch.tokens
        if shape.delta is not None:  # most layers are of that kind
            forward, backward = (self.passes(count * shape.delta.wide) for count in RULE_PASSES)
            return forward, backward
        flop = 2.0 * shape.q * t * (t / max(self.batch.documents, 1))
        reached = CUDNN_ATTENTION if shape.attention == "cudnn" else self.rates.attention
        return flop / reached[0], 2.5 * flop / reached[1]

    def weight_gradients(self, projections: Sequence[str]) -> float:
        """Of the layer's own weights, where they are trained."""
        if self.shape.trained != "all":
            return 0.0
        return 2.0 * self.shape.linear_parameters(*projections) * self.batch.tokens / self.rates.matmul


@dataclass(frozen=True)
class _Names:
    """Projections of a layer by what rebuilds them: those made from its input, the attention's last, all of them, and
    those that latent attention makes of its codes, which are kept."""

    of_input: tuple[str, ...]
    of_output: tuple[str, ...]
    all: tuple[str, ...]
    raised: tuple[str, ...]

    @classmethod
    def of(cls, shape: ModelShape) -> _Names:
        raised = () if shape.latent is None else shape.latent.raised
        if shape.delta is not None:  # most layers are of that kind
            every = (*shape.delta.names, *GATE_UP, *DOWN)
            return cls(tuple(shape.delta.inputs), (shape.delta.output,), every, raised)
        of_input = tuple(name for name in shape.of_heads if name not in raised)
        return cls(of_input, OUT, shape.projections, raised)


def layer_times(shape: ModelShape, batch: Batch, rates: Rates) -> LayerTimes:
    """Times of one layer of `shape` for a batch."""
    its, names = _Operations(shape, batch, rates), _Names.of(shape)
    product, passes = its.product, its.passes
    attend, attend_back = its.attention()
    h, i, heads = shape.hidden, shape.linear("down")[1], shape.q + shape.kv
    # A mixture takes a row for each expert of a token: written and read on the way in, and on the way out.
    rows = 0 if shape.mixture is None else shape.mixture.top_k * h
    norms = passes(6 * h)
    forward = product(*names.all) + attend + norms + passes(2 * heads + 3 * i + 2 * rows)
    backward = product(*names.all, backward=True) + its.weight_gradients(names.all) + attend_back
    backward += passes(6 * i + 8 * h + 2 * heads + 4 * rows)
    # A norm's backward wants what the down projection gave, which the levels from "attention" on keep.
    down_again = product(*DOWN) + passes(3 * i) if shape.output_norms else 0.0
    rebuilt = (*names.of_input, *(() if shape.parallel else names.of_output))
    return LayerTimes(
        forward=forward,
        backward=backward,
        rebuild_attention=product(*rebuilt) + attend + passes(2 * heads + 2 * h) + down_again,
        rebuild_glu=product(*GATE_UP) + passes(rows),
        rebuild_norms=passes(4 * h) + product(*names.raised),
        per_tile=3 * its.unpack(*GATE_UP, *DOWN) + TILE_SECONDS + its.unpack_of_long_rows(),
        full_rebuild=forward,
        heads_again=its.heads_again(),
    )


def head_time(shape: ModelShape, batch: Batch, rates: Rates, space: Space = "usual") -> float:
    """Loss: logits and their product back. Every chunk of them reads the head twice."""
    weight = shape.hidden * shape.vocabulary
    chunks = -(-batch.loss_rows // default_chunk_rows(shape.vocabulary, shape.element, "cuda", space))
    products = 4.0 * weight * batch.loss_rows / rates.matmul
    return max(products, 2.0 * chunks * weight * shape.element / rates.bandwidth)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: all of it, without recomputation and waiting, recomputing, waiting for the link; and what
    recomputing every layer's whole forward would take."""

    total: float
    base: float
    recompute: float
    waiting: float
    full_recompute: float

    @property
    def recompute_share(self) -> float:
        """Recomputation against that of full checkpointing, which runs every layer's forward again."""
        return self.recompute / self.full_recompute if self.full_recompute else 0.0


def step_time(
    shape: ModelShape,
    levels: Sequence[Level],
    batch: Batch,
    rates: Rates,
    times: LayerTimes | None = None,
    tiles: int = 1,
    space: Space = "usual",
    beside: tuple[float, float] | None = None,
    tile_rows: int | None = None,
) -> StepTime:
    """Predict a step: layers compute one after another, copies run beside them, one layer ahead or behind.

    Args:
        beside: `rebuilt_and_waited` of these levels, where it is known already.
        tile_rows: of the GLU block's tiles, by which q, k and v of long rows are made again.
    """
    times = times or layer_times(shape, batch, rates)
    recompute, waited = beside or rebuilt_and_waited(shape, levels, batch, rates, times)
    base = len(levels) * (times.forward + times.backward + (tiles - 1) * times.per_tile) + head_time(
        shape, batch, rates, space
    )
    if times.heads_again and makes_heads_again(tile_rows or TILE_ROWS, shape.qk_norm):
        base += sum(not keeps(level, "attention") for level in levels) * times.heads_again
    return StepTime(base + recompute + waited, base, recompute, waited, len(levels) * times.full_rebuild)


def rebuilt_and_waited(
    shape: ModelShape, levels: Sequence[Level], batch: Batch, rates: Rates, times: LayerTimes
) -> tuple[float, float]:
    """Seconds of recomputing, and of waiting for the link; plans try tens of thousands of levels by them."""
    kinds = set(levels)
    host = {level: host_bytes_per_token(level, shape.widths) * batch.tokens for level in kinds}
    again = {level: times.rebuild(level) for level in kinds}
    recompute = sum(again[level] for level in levels)
    if not any(host.values()):
        return recompute, 0.0
    sizes = [host[level] for level in levels]
    first = batch.tokens * shape.hidden * shape.residual_element
    waited = _forward_wait(sizes, first, times.forward, rates.link)
    backward = [times.backward + again[level] for level in levels]
    return recompute, waited + _backward_wait(sizes, first, backward, rates.link)


def _forward_wait(sizes: Sequence[int], first: int, each: float, link: float) -> float:
    """Waiting in forward under `HostStash.park`'s rule for bytes in flight; `first` are those of a layer's input."""
    clock = free_at = waited = 0.0
    allowed = 0
    leaving: deque[tuple[int, float]] = deque()
    flying = 0
    for size in sizes:
        clock += each
        if not size:
            continue
        free_at = max(free_at, clock) + size / link
        leaving.append((size, free_at))
        flying += size
        allowed = max(allowed, bytes_in_flight(size, first))
        while flying > allowed:
            left, done = leaving.popleft()
            flying -= left
            waited += max(0.0, done - clock)
            clock = max(clock, done)
    return waited


def _backward_wait(sizes: Sequence[int], first: int, each: Sequence[float], link: float) -> float:
    """Waiting in backward, where the copy of the layer below begins when a layer does, or late when it ends."""
    clock = waited = 0.0
    arrives = 0.0
    for index in reversed(range(len(sizes))):
        waited += max(0.0, arrives - clock)
        clock = max(clock, arrives)
        begins, clock = clock, clock + each[index]
        arrives = begins
        if index > 0 and sizes[index - 1]:
            late = comes_late(sizes[index - 1], first)
            arrives = (clock if late else begins) + sizes[index - 1] / link
    return waited
