"""Short prompts, one at a time, as recorded CUDA graphs: their first token waits for the GPU, not for the host.

What of a prompt is not in the cache is rounded up to whole blocks, so that there are few sizes. What is computed
beyond its end is seen by nobody: the attention is causal, and those keys lie in the prompt's own last block, where the
answer's tokens write before they are read. Where a prompt goes on from a beginning that was found in the cache, all of
its keys are gathered from their blocks, in room for 1,024 tokens or twice, four or eight times as many. A size is
computed launch by launch the first time, recorded the second time and replayed from then on. Llama-3.1-8B: 32 · 9 + 6
launches, which a host makes in 5 to 15 ms; an H200 computes 512 tokens in 13.

On a CPU the same is computed without being recorded, which is how it is tested there.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.inference.decoder import Decoder
from pronghorn.inference.forward import Cache, PackedAttention, Part, logits_of, run_layers
from pronghorn.inference.mixture import GatedMlp
from pronghorn.inference.paging import BLOCK_TOKENS
from pronghorn.inference.projections import Group, Segment
from pronghorn.inference.recording import pool_beside, recorded
from pronghorn.inference.sequences import Sequence
from pronghorn.kernels.decode_attention import Heads

logger = logging.getLogger("pronghorn")

#: new tokens of a recorded prompt at most: more of them keep a GPU busy while the host launches
MOST_TOKENS = 1024
#: the least and the most tokens that there is room for where a prompt goes on
LEAST_CONTEXT, MOST_CONTEXT = 1024, 8192
#: shapes that are kept at a time
MOST_KEPT = 48
#: of the largest logit, by what one of a recorded prompt's may differ: some roundings of bf16
MOST_OFF = 0.05


class Shape(NamedTuple):
    """What a recording is of: new tokens, room for the whole context where it goes on (else 0), adapter."""

    size: int
    context: int
    adapter: str | None

    @staticmethod
    def of(sequence: Sequence) -> Shape:
        whole = _rounded(len(sequence.tokens))
        context = max(LEAST_CONTEXT, 1 << (whole - 1).bit_length()) if sequence.cached else 0
        return Shape(whole - sequence.cached, context, sequence.request.adapter)

    def cut(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Tokens, where their keys go, the row of the last one; their positions, where keys and queries begin and end,
        and the context's blocks."""
        goes_on = bool(self.context)
        widths = self.size, self.size, 1, goes_on * self.size, goes_on * 4, self.context // BLOCK_TOKENS
        return numbers[: sum(widths)].split(widths)


class Prompts:
    """Computes prompts that come alone.

    Args:
        records: whether there is a GPU to record for.

    Attributes:
        pool: of the graphs' memory; None where nothing is recorded.
    """

    def __init__(self, decoder: Decoder, cache: Cache, records: bool) -> None:
        self.decoder, self.cache = decoder, cache
        # Not that of decoding steps: these stay sound whatever happens here.
        self.pool: object = torch.cuda.graph_pool_handle() if records else None
        #: what `Shape.cut` names, side by side
        room = 3 * MOST_TOKENS + 5 + MOST_CONTEXT // BLOCK_TOKENS
        self.numbers = torch.zeros(room, dtype=torch.int64, device=decoder.device)
        self._prompts: OrderedDict[Shape, _Prompt] = OrderedDict()
        self._refused = not _fits(decoder)

    def forget(self) -> None:
        """The decoder has been read again."""
        self._prompts.clear()
        self._refused = not _fits(self.decoder)

    def takes(self, parts: Many[tuple[Sequence, int]]) -> bool:
        """Whether these are one prompt up to its end, of a size that is recorded."""
        sequence, end = parts[0]
        if self._refused or len(parts) > 1 or sequence.cached % BLOCK_TOKENS or end < len(sequence.tokens):
            return False
        size, context, _ = Shape.of(sequence)
        fits = size <= MOST_TOKENS and context <= MOST_CONTEXT
        return fits and all(
            not table.first_row(end) and sequence.cached + size <= len(table.cos)
            for table in self.decoder.rotations.values()
        )

    def logits(self, sequence: Sequence) -> Tensor:
        """fp32 [1, V] of the token after the prompt, whose keys and values are in the cache then."""
        shape = Shape.of(sequence)
        prompt = self._prompts.get(shape)
        if prompt is None:
            prompt = self._prompts[shape] = _Prompt(self, shape)
            if len(self._prompts) > MOST_KEPT:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(shape)
        self._send(sequence, shape)
        return prompt.logits()

    def _send(self, sequence: Sequence, shape: Shape) -> None:
        room = sum(map(len, shape.cut(self.numbers)))
        numbers = torch.zeros(room, dtype=torch.int64, pin_memory=self.numbers.is_cuda)
        tokens, places, last, positions, ends, table = shape.cut(numbers)
        new, begin = sequence.tokens[sequence.cached :], sequence.cached
        tokens[: len(new)] = torch.tensor(new)
        blocks = torch.tensor(sequence.blocks)
        starts = blocks[begin // BLOCK_TOKENS :, None] * BLOCK_TOKENS
        places[:] = (starts + torch.arange(BLOCK_TOKENS)).view(-1)
        last[0] = len(new) - 1
        if shape.context:
            torch.arange(begin, begin + shape.size, out=positions)
            ends[1], ends[3] = begin + shape.size, shape.size
            table[: len(blocks)] = blocks
        self.numbers[:room].copy_(numbers, non_blocking=True)


class _Prompt:
    """One shape."""

    def __init__(self, prompts: Prompts, shape: Shape) -> None:
        # Not held: the cache's memory and the graphs' go with the engine, not when Python looks for cycles.
        self.prompts: Prompts = weakref.proxy(prompts)
        size = shape.size
        self.segments = [Segment(shape.adapter, slice(0, size))], [Segment(shape.adapter, slice(0, 1))]
        #: to the end, so that all kernels and what they keep between launches are there
        self._computed = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self.tokens, places, last, self.positions, self.ends, table = shape.cut(prompts.numbers)
        # Made here, since a recording copies nothing from the host; rotated as the shortest contexts are. Blocks that
        # are no neighbours: keys are gathered by the table.
        whole = shape.context or size
        part = Part(whole - size, size, [0] * (whole // BLOCK_TOKENS), length=1)
        self.attend = PackedAttention(prompts.decoder, prompts.cache, [part], shape.adapter)
        self.attend.places, self.attend.last_rows = places, last
        if shape.context:
            self.attend.tables = [table]

    def logits(self) -> Tensor:
        if self._graph is not None:
            self._graph.replay()
        elif not (self._computed and self._record()):
            logits = self._compute()
            self._computed = True
            return logits
        assert self._logits is not None
        return self._logits

    def _record(self) -> bool:
        """Whether there is a recording now, which has been replayed; the kernels are there since the first prompt of
        this size."""
        prompts = self.prompts
        if prompts.pool is None:
            return False
        prompts.pool = pool_beside((prompt._graph for prompt in prompts._prompts.values()), prompts.pool)
        self._graph, self._logits = recorded(self._compute, prompts.pool, "prompts")
        if self._graph is None or not self._is_right():
            self._graph = self._logits = prompts.pool = None
        return self._graph is not None

    def _is_right(self) -> bool:
        """Whether what was recorded gives what launches give, for the prompt that is there; once for each shape."""
        assert self._graph is not None and self._logits is not None
        expected = self._compute()
        self._graph.replay()
        # The same kernels in the same order; only the matrix library may choose others in a recording.
        off = float((self._logits - expected).abs().max() / expected.abs().max())
        if off <= MOST_OFF:
            return True
        logger.warning(
            "pronghorn: recorded prompts give other logits than launched ones (by %.2g of the largest); they are "
            "launched one by one from here on",
            off,
        )
        return False

    def _compute(self) -> Tensor:
        decoder, attend = self.prompts.decoder, self.attend
        whole, last = self.segments
        if attend.continues:
            attend.ends = self.ends.view(2, 2).to(torch.int32)
            tables = decoder.rotations.items()
            attend.angles = {kind: (t.cos[self.positions], t.sin[self.positions]) for kind, t in tables}
        x = run_layers(decoder, decoder.embed(self.tokens), whole, attend)
        return logits_of(decoder, x.index_select(0, attend.last_rows), last)


def _rounded(length: int) -> int:
    return -(-length // BLOCK_TOKENS) * BLOCK_TOKENS


def _fits(decoder: Decoder) -> bool:
    """Whether a layer's launches depend on nothing but the number of tokens, and tokens not on those behind them."""
    if decoder.only_active or decoder.recurrent:
        return False
    return all(
        isinstance(layer.heads, Heads)
        and isinstance(layer.mlp, GatedMlp)
        and _packs(decoder, layer.heads)
        and not any(map(_quantises_rows, layer.groups))
        for layer in decoder.layers
    )


def _packs(decoder: Decoder, heads: Heads) -> bool:
    """Whether a GPU's attention is one launch that asks the host for nothing."""
    if decoder.device.type != "cuda":
        return True
    windowed = heads.window is not None
    return decoder.attention_backend(decoder.dtype, heads.head_dim, windowed) == "flash"


def _quantises_rows(group: Group) -> bool:
    """FP8 may take one scale for all rows, those beyond the prompt's end among them."""
    return any(weight.quantises_rows for weight in group.weights)
