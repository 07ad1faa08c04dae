"""Short prompts, one at a time, as recorded CUDA graphs: their first token waits for the GPU, not for the host.

A prompt is rounded up to whole blocks of the cache, so that there are few sizes. What is computed beyond its end is
seen by nobody: the attention is causal, and those keys lie in the prompt's own last block, where the answer's tokens
write before they are read. A size is computed launch by launch the first time, recorded the second time and replayed
from then on. Llama-3.1-8B: 32 · 9 + 6 launches, which a host makes in 5 to 15 ms; an H200 computes 512 tokens in 13.

On a CPU the same is computed without being recorded, which is how it is tested there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from pronghorn.inference.decoder import Decoder
from pronghorn.inference.forward import Cache, PackedAttention, Part, logits_of, run_layers
from pronghorn.inference.mixture import GatedMlp
from pronghorn.inference.paging import BLOCK_TOKENS
from pronghorn.inference.projections import Group, Segment
from pronghorn.inference.recording import recorded
from pronghorn.inference.sequences import Sequence
from pronghorn.kernels.decode_attention import Heads

#: tokens of a recorded prompt at most: longer ones keep a GPU busy while the host launches
MOST_TOKENS = 1024
#: sizes and adapters that are kept at a time
MOST_KEPT = 32


class Prompts:
    """Computes prompts that begin a context by themselves.

    Args:
        records: whether there is a GPU to record for.

    Attributes:
        pool: of the graphs' memory; None where nothing is recorded.
    """

    def __init__(self, decoder: Decoder, cache: Cache, records: bool) -> None:
        self.decoder, self.cache = decoder, cache
        # Not that of decoding steps: these stay sound whatever happens here.
        self.pool: object = torch.cuda.graph_pool_handle() if records else None
        #: a prompt's tokens, where its keys go, and which token is its last: side by side, each of its size
        self.numbers = torch.zeros(2 * MOST_TOKENS + 1, dtype=torch.int64, device=decoder.device)
        self._prompts: OrderedDict[tuple[int, str | None], _Prompt] = OrderedDict()
        self._refused = not _fits(decoder)

    def forget(self) -> None:
        """The decoder has been read again."""
        self._prompts.clear()
        self._refused = not _fits(self.decoder)

    def takes(self, parts: Many[tuple[Sequence, int]]) -> bool:
        """Whether these are one whole prompt of a size that is recorded."""
        sequence, end = parts[0]
        if self._refused or len(parts) > 1 or sequence.cached or end < len(sequence.tokens):
            return False
        size, rotations = _rounded(end), self.decoder.rotations.values()
        return size <= MOST_TOKENS and all(
            not table.first_row(end) and size <= len(table.cos) for table in rotations
        )

    def logits(self, sequence: Sequence) -> Tensor:
        """fp32 [1, V] of the token after the prompt, whose keys and values are in the cache then."""
        length = len(sequence.tokens)
        size, adapter = _rounded(length), sequence.request.adapter
        prompt = self._prompts.get((size, adapter))
        if prompt is None:
            prompt = self._prompts[size, adapter] = _Prompt(self, size, adapter)
            if len(self._prompts) > MOST_KEPT:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end((size, adapter))
        self._send(sequence, length, size)
        return prompt.logits()

    def _send(self, sequence: Sequence, length: int, size: int) -> None:
        numbers = torch.zeros(2 * size + 1, dtype=torch.int64, pin_memory=self.numbers.is_cuda)
        numbers[:length] = torch.tensor(sequence.tokens)
        blocks = torch.tensor(sequence.blocks)[:, None] * BLOCK_TOKENS
        numbers[size : 2 * size] = (blocks + torch.arange(BLOCK_TOKENS)).view(-1)
        numbers[-1] = length - 1
        self.numbers[: len(numbers)].copy_(numbers, non_blocking=True)


class _Prompt:
    """One size, through one adapter or none."""

    def __init__(self, prompts: Prompts, size: int, adapter: str | None) -> None:
        self.prompts, self.size = prompts, size
        self.segments = [Segment(adapter, slice(0, size))], [Segment(adapter, slice(0, 1))]
        self._uses = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        # Made here, since a recording copies nothing from the host; rotated as the shortest contexts are.
        part = Part(0, size, range(size // BLOCK_TOKENS), length=1)
        self.attend = PackedAttention(prompts.decoder, prompts.cache, [part], adapter)
        self.attend.places = prompts.numbers[size : 2 * size]
        self.attend.last_rows = prompts.numbers[2 * size : 2 * size + 1]

    def logits(self) -> Tensor:
        self._uses += 1
        if self._graph is None and self._uses > 1 and self.prompts.pool is not None:
            self._record()
        if self._graph is None:
            return self._compute()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _record(self) -> None:
        """The kernels are there since the first prompt of this size."""
        self._graph, self._logits = recorded(self._compute, self.prompts.pool, "prompts")
        if self._graph is None:
            self.prompts.pool = None

    def _compute(self) -> Tensor:
        decoder = self.prompts.decoder
        whole, last = self.segments
        x = run_layers(decoder, decoder.embed(self.prompts.numbers[: self.size]), whole, self.attend)
        return logits_of(decoder, x.index_select(0, self.attend.last_rows), last)


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
