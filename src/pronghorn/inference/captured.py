"""Decoding steps recorded as CUDA graphs, one for every size of batch, launched before the last one's tokens are read.

Rows are slots: a sequence keeps its own while it runs. What a step reads lies in buffers that stay where they are:
tokens and lengths (each step writes the next ones itself), block tables, adapters. The host sends what a step does not
find as the last one left it: rows that come and go, and blocks; it waits for nothing but the tokens of the step before.

On a CPU the same steps run without being recorded, which is how they are tested there.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from pronghorn.inference.chooser import Chooser
from pronghorn.inference.choosing import Tops, is_plain
from pronghorn.inference.decoder import Decoder
from pronghorn.inference.forward import Cache
from pronghorn.inference.fused import FusedDecoder, Table
from pronghorn.inference.mixture import ExpertTable
from pronghorn.inference.moving import on_device, to_host
from pronghorn.inference.paging import BLOCK_TOKENS
from pronghorn.inference.prompts import Prompts
from pronghorn.inference.recording import pool_beside, recording
from pronghorn.inference.requests import Token
from pronghorn.inference.runner import Done, EagerRunner, Pending, StepLost
from pronghorn.inference.sequences import Sequence
from pronghorn.kernels.decode_attention import Paged
from pronghorn.kernels.next_token import Rows, take_likeliest_

#: steps whose tokens the host may yet have to read: one runs while the last one's are read, and some room
TURNS = 4
#: sizes of batches that steps are recorded for
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class InFlight:
    """A step whose tokens are on their way to the host.

    Args:
        numbers: in the host's memory, once the stream has come so far: what the step's programs count as lost, and by
            row the tokens.
        rows: of the sequences.
    """

    def __init__(
        self, sequences: Many[Sequence], rows: Many[int], numbers: Tensor, tops: Tops | None, on_gpu: bool
    ) -> None:
        self.sequences, self.rows, self.numbers, self.tops = sequences, rows, numbers, tops
        self.ready = None
        if on_gpu:
            self.ready = torch.cuda.Event()
            self.ready.record()

    def tokens(self) -> list[tuple[Sequence, Token]]:
        if self.ready is not None:
            self.ready.synchronize()
        lost, *numbers = self.numbers.tolist()
        if lost:
            raise StepLost
        tokens = [Token(numbers[row]) for row in self.rows]
        if self.tops is not None:
            tokens = self.tops.tell(self.sequences, tokens)
        return list(zip(self.sequences, tokens, strict=True))


class CapturedRunner(EagerRunner):
    """Decodes in recorded steps, and prefills short prompts that come alone in recorded passes (`prompts`).

    Args:
        max_batch: number of slots. max_context: tokens of a sequence at most.
    """

    runs_ahead = True

    def __init__(self, decoder: Decoder, cache: Cache, max_batch: int, max_context: int) -> None:
        super().__init__(decoder, cache)
        device = decoder.device
        #: how many programs of steps have waited in vain for others, and by row the next token: copied together
        self._board = torch.zeros(1 + max_batch, dtype=torch.int64, device=device)
        self._lost: Tensor | None = self._board[:1]
        self.tokens = self._board[1:]
        self.fused = FusedDecoder(decoder, self._lost)
        self.sizes = sorted({min(size, max_batch) for size in SIZES} | {max_batch})
        blocks = -(-max_context // BLOCK_TOKENS) + 1
        #: by row: tokens of the context, the new one included, or 0; the adapter's slot; a token the host knows, or -1;
        #: the slot of what recurrent layers remember; where in `_told` the step's token goes
        self.state = torch.zeros(5, max_batch, dtype=torch.int32, device=device)
        #: what steps tell the host, one after another: like `_board`
        self._told = torch.zeros(TURNS, 1 + max_batch, dtype=torch.int64, pin_memory=device.type == "cuda")
        if device.type == "cuda":
            # Kernels write there, of which the host's allocator knows nothing: not before they have is it given away.
            weakref.finalize(self, _await_steps, device, self._told).atexit = False
        self._turn = 0
        self.tables = torch.zeros(max_batch, blocks, dtype=torch.int32, device=device)
        #: `state` as it is there once the last step is over; None where nobody knows
        self._there: list[list[int]] | None = None
        #: by row what its table holds: the sequence's number and how many blocks
        self._held: dict[int, tuple[int, int]] = {}
        self._steps: dict[int, _Step] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.prompts = Prompts(decoder, cache, records=device.type == "cuda")
        self.chooser = Chooser(records=device.type == "cuda")

    def prefill(self, parts: Many[tuple[Sequence, int]]) -> Pending:
        if self.prompts.takes(parts):
            sequences, logits = [parts[0][0]], self.prompts.logits(parts[0][0])
        else:
            sequences, found = self.prefilled(parts)
            if found is None:
                return Done([])
            logits = found
        return self._chosen(sequences, logits, None)

    def decode(self, sequences: Many[Sequence]) -> Pending:
        size = self._size(1 + max(_slot(sequence) for sequence in sequences))
        there, self._there = self._send(sequences, size), None
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = _Step(self, size)
        logits = step.run()
        self._there = _after(there, size)
        told, self._turn = self._told[self._turn], (self._turn + 1) % TURNS
        rows, on_gpu = [_slot(sequence) for sequence in sequences], self._board.is_cuda
        if is_plain(sequences):
            return InFlight(sequences, rows, told, None, on_gpu)
        index = None if rows == list(range(size)) else on_device(rows, torch.int64, self.decoder.device)
        logits = logits if index is None else logits.index_select(0, index)
        return self._chosen(sequences, logits.float(), index)

    def _chosen(self, sequences: Many[Sequence], logits: Tensor, index: Tensor | None) -> Pending:
        """Tokens for fp32 logits [n, V] of sequences, put where the next step looks for them.

        Args:
            index: their slots on the device, where they are there already.
        """
        rows, plain = [_slot(sequence) for sequence in sequences], is_plain(sequences)
        chosen = logits.argmax(-1) if plain else self.chooser(sequences, logits)
        tops = None if plain else Tops.of(sequences, logits, chosen)
        if rows == list(range(rows[0], rows[0] + len(rows))):
            self.tokens[rows[0] : rows[0] + len(rows)] = chosen
        else:
            index = on_device(rows, torch.int64, self.decoder.device) if index is None else index
            self.tokens.index_copy_(0, index, chosen)
        numbers = to_host(self._board[: 2 + max(rows)])
        return InFlight(sequences, rows, numbers, tops, self._board.is_cuda)

    def is_prepared(self, sequences: Many[Sequence]) -> bool:
        return not sequences or self._size(1 + max(map(_slot, sequences))) in self._steps

    def is_sparse(self, sequences: Many[Sequence]) -> bool:
        """Whether the sequences would take a smaller step in other slots."""
        return bool(sequences) and self._size(len(sequences)) < self._size(1 + max(map(_slot, sequences)))

    def leave(self, sequence: Sequence) -> None:
        self._held.pop(_slot(sequence), None)

    def recover(self) -> None:
        """Go on without launches whose programs wait for each other."""
        if self._board.is_cuda:
            # The step after the lost one still runs what is let go of here.
            torch.cuda.synchronize(self._board.device)
        self._lost = None
        self.fused = FusedDecoder(self.decoder)
        self._steps.clear()
        self._board.zero_()
        self._there = None

    def refresh(self) -> None:
        """Take the decoder as it was read again; recorded steps stay where only numbers have changed."""
        self.prompts.forget()
        before, after = self.fused, FusedDecoder(self.decoder, self._lost)
        kept = before.weights == after.weights and _fill(before.tables(), after.tables())
        if kept:
            for old, new in zip(before.biases(), after.biases(), strict=True):
                if old.data_ptr() != new.data_ptr():  # a copy; the model's own would count as written to
                    old.copy_(new)
        else:
            self.fused = after
            self._steps.clear()

    def _size(self, rows: int) -> int:
        return next(size for size in self.sizes if size >= rows)

    def _send(self, sequences: Many[Sequence], size: int) -> list[list[int]]:
        """Send what is other than `state` and the tables hold; `state` as it is then."""
        state = [[0] * size, [0] * size, [-1] * size, [0] * size, [self._turn] * size]
        for sequence in sequences:
            row = _slot(sequence)
            state[0][row] = sequence.length
            state[1][row] = self.decoder.slot(sequence.request.adapter)
            if not sequence.in_flight:
                state[2][row] = sequence.tokens[-1]
            state[3][row] = sequence.state or 0
            held = sequence.id, len(sequence.blocks)
            if self._held.get(row) != held:
                self._held[row] = held
                blocks = on_device(sequence.blocks, torch.int32, self.tables.device)
                self.tables[row, : len(sequence.blocks)].copy_(blocks)
        if self._there is None:
            self.state.zero_()
            there = [[0] * self.state.shape[1] for _ in state]
        else:
            there = self._there
        if [part[:size] for part in there] != state:
            self.state[:, :size].copy_(on_device(state, torch.int32, self.state.device))
        return [new + old[size:] for new, old in zip(state, there, strict=True)]

    def compute(self, size: int) -> Tensor:
        """Logits [size, V] of the rows' next tokens in some dtype; the likeliest ones into `tokens`, and into `state`
        what the next step takes."""
        lengths, slots, given, states, turns = self.state[:, :size].unbind(0)
        if self.decoder.recurrent:
            # Rows that hold no sequence go on in the slot that nobody has.
            states = states.masked_fill(lengths == 0, self.cache.slots)
        x = self.fused.embed(self.tokens[:size], given)
        logits = self.fused.logits(x, self.cache, Paged(self.tables[:size], lengths, states=states), slots)
        take_likeliest_(logits, Rows(self.tokens[:size], lengths, given, turns, self._told, self._board[:1]))
        return logits


def _await_steps(device: torch.device, told: Tensor) -> None:
    """Hold `told` until the steps of a runner that is gone are over."""
    torch.cuda.synchronize(device)


def _after(state: list[list[int]], size: int) -> list[list[int]]:
    """What a step of `size` rows leaves of `state`."""
    lengths, slots, given, states, turns = state
    longer = [length + (length > 0) for length in lengths[:size]]
    next_turns = [(turn + 1) % TURNS for turn in turns[:size]]
    return [longer + lengths[size:], slots, [-1] * size + given[size:], states, next_turns + turns[size:]]


class _Step:
    """One size's step: recorded when it is first needed, or computed each time where nothing can be recorded."""

    def __init__(self, runner: CapturedRunner, size: int) -> None:
        # Not held: the cache's memory and the graphs' go with the engine, not when Python looks for cycles.
        self.runner: CapturedRunner = weakref.proxy(runner)
        self.size = size
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        if runner.decoder.device.type == "cuda":
            self._record()

    def _record(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.rehearse()
        torch.cuda.current_stream().wait_stream(side)
        runner = self.runner
        runner._pool = pool_beside((step._graph for step in runner._steps.values()), runner._pool)
        self._graph = torch.cuda.CUDAGraph()
        with recording(self._graph, runner._pool):
            self._logits = self.runner.compute(self.size)

    def rehearse(self) -> None:
        """A first run, in which kernels are compiled and chosen: no row holds a sequence, and nothing is told but where
        this step's own tokens go; those of the step before may yet have to be read."""
        runner = self.runner
        sent, tokens = runner.state.clone(), runner.tokens.clone()
        runner.state[:4].zero_()
        runner.compute(self.size)
        runner.state.copy_(sent)
        runner.tokens.copy_(tokens)

    def run(self) -> Tensor:
        if self._graph is None:
            return self.runner.compute(self.size)
        self._graph.replay()
        assert self._logits is not None
        return self._logits


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def _fill(kept: Many[Table | ExpertTable | None], new: Many[Table | ExpertTable | None]) -> bool:
    """Copy new tables over kept ones; False, and nothing copied, where shapes differ."""
    if list(map(_shapes, kept)) != list(map(_shapes, new)):
        return False
    for old, table in zip(kept, new, strict=True):
        if old is not None and table is not None:
            for place, tensor in zip(old.tensors(), table.tensors(), strict=True):
                place.copy_(tensor)
    return True


def _shapes(table: Table | ExpertTable | None) -> object:
    return None if table is None else [tensor.shape for tensor in table.tensors()]
