"""Answers many requests at once over one copy of the weights: continuous batching over a cache in blocks.

A step is either a prefill (prompts whose blocks were found, together, or a part of a long one) or one more token of
every running request. A request enters as soon as there is room for its prompt, and leaves as soon as it ends. When
blocks run out, the request that came last gives its own up and waits; what it has is computed again later. What a
request is answered depends on nothing but the request: not on what else is in the batch, nor on when it came, up to the
rounding of sums in another order.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from pronghorn.engine.binding import base_causal_lm
from pronghorn.hardware import gpu_memory, probe
from pronghorn.inference.captured import CapturedRunner
from pronghorn.inference.checks import check_request
from pronghorn.inference.decoder import Decoder
from pronghorn.inference.forward import Cache, cache_bytes_per_token, state_bytes_per_sequence
from pronghorn.inference.paging import BLOCK_TOKENS, BlockPool
from pronghorn.inference.requests import Event, FinishReason, Request, Token
from pronghorn.inference.runner import EagerRunner, Pending, Runner, StepLost
from pronghorn.inference.sequences import Sequence
from pronghorn.memory.host import available_host_bytes

logger = logging.getLogger("pronghorn")

#: of the memory that is free, the share that the cache takes unless told otherwise
CACHE_SHARE = 0.8
#: new tokens of one prefill at most: beyond it a GPU gains nothing, and those who decode wait
PREFILL_TOKENS = {"cuda": 8192, "cpu": 2048}


class Engine:
    """Runs requests on a model. Not thread-safe: one thread drives it.

    Args:
        model: a loaded causal LM or a PEFT model of one; its weights are used where they are. It is put into
            evaluation mode by nobody: adapters' dropout never runs here.
        max_batch: requests that decode at a time; fewer where layers are recurrent and memory is short.
        max_context: tokens of a prompt with its answer at most; None: the model's own limit.
        cache_tokens: tokens that the cache holds; None: what 80 % of the free memory holds, or all that `max_batch`
            requests of `max_context` tokens can need.
        prefix_sharing: let requests share the cache of what they begin with alike; never where layers are recurrent
            (`inference.recurrent`).

    Raises:
        EngineRefused: only Transformers' own code can run this model.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch: int = 64,
        max_context: int | None = None,
        cache_tokens: int | None = None,
        prefix_sharing: bool = True,
    ) -> None:
        # Of a model for images it is the text part that has it.
        config = base_causal_lm(model).config.get_text_config()
        limit = int(getattr(config, "max_position_embeddings", 0) or 8192)
        self.max_context = max_context or limit
        #: what `max_batch` was asked to be
        self.asked_batch = max_batch
        with _outside_of_autograd():
            self._decoder = Decoder(model, self.max_context)
            self.max_batch, room = _batch_and_room(self._decoder, max_batch)
            wanted = self.max_batch * (self.max_context + BLOCK_TOKENS)
            tokens = cache_tokens or min(wanted, room)
            blocks = max(1, tokens // BLOCK_TOKENS)
            self.max_context = min(self.max_context, blocks * BLOCK_TOKENS)
            self._pool = BlockPool(blocks, prefix_sharing and not self._decoder.recurrent)
            cache = Cache(self._decoder, blocks, self.max_batch)
            self._runner = _runner(self._decoder, cache, self.max_batch, self.max_context)
        self._prefill_tokens = PREFILL_TOKENS.get(self._decoder.device.type, 2048)
        #: slots of states that nobody has, where layers are recurrent
        self._free_states = list(range(self.max_batch)) if self._decoder.recurrent else []
        self._next_id = 0
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        #: a prompt of which only a part is in the cache
        self._partial: Sequence | None = None
        self._decode_first = False
        self._cancelled: list[int] = []
        self._pending: Pending | None = None

    # --- for status ----------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that requests may give as their adapter."""
        return self._decoder.adapters

    @property
    def active_adapter(self) -> str | None:
        """The adapter that the model itself runs when it is called; None for none."""
        return self._decoder.active

    @property
    def several_active(self) -> bool:
        """Whether the model runs several adapters at once, which a request cannot ask for."""
        return self._decoder.several_active

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return bool(self._waiting or self._running or self._partial or self._cancelled or self._pending)

    @property
    def total_blocks(self) -> int:
        return self._pool.count

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return self._pool.free

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running) + (self._partial is not None)

    @property
    def waiting(self) -> int:
        """Requests that have not begun, or had to give up their blocks."""
        return len(self._waiting)

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: Request, *, also_seen: Iterable[int] = (), refresh: bool = True) -> int:
        """Queue a request; returns its number.

        Args:
            also_seen: tokens that the repetition penalty counts as seen besides the request's own.
            refresh: look whether the model has changed, if the engine is idle; False where the caller just has.

        Raises:
            SamplingInvalid, RequestTooLong, AdapterUnknown: see `checks.check_request`.
        """
        if refresh and not self.has_work:
            self.refresh()
        decoder = self._decoder
        only = decoder.active if decoder.only_active else None
        check_request(request, decoder.vocabulary, self.max_context, self.adapters, only)
        seed = request.sampling.seed
        if seed is None:
            seed = int(torch.randint(0, 2**62, (1,)).item()) if request.sampling.temperature else 0
        number, self._next_id = self._next_id, self._next_id + 1
        stops = frozenset(request.sampling.stop_token_ids)
        self._waiting.append(
            Sequence(number, request, seed, list(request.prompt_ids), stops, tuple(also_seen))
        )
        return number

    def cancel(self, request_id: int) -> None:
        """Stop a request and free its blocks; an event tells of it. One that is over already stays so."""
        found = self._running.pop(request_id, None)
        if found is None and self._partial is not None and self._partial.id == request_id:
            found, self._partial = self._partial, None
        if found is None:
            found = next((s for s in self._waiting if s.id == request_id), None)
            if found is None:
                return
            self._waiting.remove(found)
        self._drop(found)
        self._cancelled.append(request_id)

    def refresh(self) -> None:
        """Take the model's weights and adapters as they are now; called by itself whenever the engine was idle.

        Only while nothing runs: answers under way would go on with other weights than they began with.
        """
        with _outside_of_autograd():
            if self._decoder.refresh():
                self._pool.forget_all()
                try:
                    self._runner.refresh()
                except ValueError as reason:
                    self._runner = _step_by_step(self._decoder, self._runner.cache, reason)

    def step(self) -> list[Event]:
        """Prefill or decode once; what is new since the last call. [] where nothing is, or where it is on its way."""
        with _outside_of_autograd():
            return self._step()

    def _step(self) -> list[Event]:
        events = [Event(number, (), "cancelled") for number in self._cancelled]
        self._cancelled.clear()
        decode_first = self._decode_first and self._running
        if not decode_first and (batch := self._next_prefill()):
            events += self._collect()
            self._decode_first = self._partial is not None
            return events + self._prefill(batch)
        self._decode_first = False
        return events + self._decode()

    # --- prefill -------------------------------------------------------------------------------------------------

    def _next_prefill(self) -> list[Sequence]:
        """Sequences to be computed together, their blocks held; [] where none can begin."""
        if self._partial is not None:
            return [self._partial]
        batch: list[Sequence] = []
        beginnings: set[tuple[int, ...]] = set()
        left = self._prefill_tokens
        while self._waiting and len(self._running) + len(batch) < self.max_batch:
            sequence = self._waiting[0]
            if batch and sequence.request.adapter != batch[0].request.adapter:
                break
            beginning = tuple(sequence.tokens[:BLOCK_TOKENS])
            if self._pool.sharing and len(sequence.tokens) > BLOCK_TOKENS and beginning in beginnings:
                break  # a step later its beginning is found in the cache
            if not self._take_in(sequence, left if batch else None):
                break
            self._waiting.popleft()
            beginnings.add(beginning)
            batch.append(sequence)
            left -= len(sequence.tokens) - sequence.cached
            if left <= 0:
                break
        return batch

    def _take_in(self, sequence: Sequence, most: int | None) -> bool:
        """Hold a waiting sequence's blocks, and where others run, leave each of those one to grow into."""
        sequence.find_shared(self._pool, self._is_long(len(sequence.tokens)))
        needed = -(-len(sequence.tokens) // BLOCK_TOKENS) - len(sequence.blocks)
        fits = most is None or len(sequence.tokens) - sequence.cached <= most
        if fits and needed + len(self._running) <= self._pool.free:
            return sequence.grow(self._pool, len(sequence.tokens))
        sequence.release(self._pool)
        return False

    def _prefill(self, batch: list[Sequence]) -> list[Event]:
        parts = [(s, min(len(s.tokens), s.cached + self._prefill_tokens)) for s in batch]
        for sequence, end in parts:
            if self._decoder.recurrent and sequence.state is None:
                sequence.state = self._free_states.pop()
            if end == len(sequence.tokens):
                sequence.slot = self._free_slot()
                self._running[sequence.id] = sequence
        self._partial = next((s for s, end in parts if end < len(s.tokens)), None)
        pending = self._runner.prefill(parts)
        for sequence, end in parts:
            sequence.cached = end
            sequence.publish(self._pool)
        if not self._runner.runs_ahead:
            return self._take(pending.tokens())
        # The first step of decoding is launched before these are read, as every other one is.
        self._pending = pending
        for sequence, end in parts:
            sequence.in_flight += end == len(sequence.tokens)
        return []

    def _free_slot(self) -> int:
        taken = {sequence.slot for sequence in self._running.values()}
        return next(slot for slot in range(self.max_batch) if slot not in taken)

    # --- decoding ------------------------------------------------------------------------------------------------

    def _decode(self) -> list[Event]:
        """Launch one more token of all that want one; the tokens of this step, or of the one before."""
        if self._pending is not None and not self._runner.is_prepared(self._in_order()):
            return self._collect()  # who waits for their first token is told it meanwhile
        events: list[Event] = []
        if any(s.left and not s.grow(self._pool, s.length) for s in self._in_order()):
            # Who has ended, and what the others' tokens are, has to be known before anybody gives up blocks.
            events += self._collect()
            self._make_room()
        if any(s.left and self._outgrows(s) for s in self._in_order()):
            events += self._collect()
            for sequence in filter(self._outgrows, self._in_order()):
                self._preempt(sequence)
        if self._pending is not None and self._waits_for_tokens():
            events += self._collect()
        batch = [s for s in self._in_order() if s.left]
        if self._runner.is_sparse(batch):
            events += self._collect()
            batch = self._pack_slots()
        # One that fails leaves all as it was: the last step's tokens can still be read.
        launched = self._runner.decode(batch) if batch else None
        pending, self._pending = self._pending, launched
        for sequence in batch:
            sequence.in_flight += 1
        if not self._runner.runs_ahead:
            pending, self._pending = self._pending, None
        return events + (self._read(pending) if pending is not None else [])

    def _waits_for_tokens(self) -> bool:
        """Whether the next step needs the last one's tokens on the host, for a penalty on them."""
        return any(s.request.sampling.repetition_penalty != 1 for s in self._running.values())

    def _pack_slots(self) -> list[Sequence]:
        """Move the running sequences to the lowest slots; the last step's tokens have been read."""
        batch = [s for s in self._in_order() if s.left]
        for sequence in self._running.values():
            self._runner.leave(sequence)
        for slot, sequence in enumerate(self._in_order()):
            sequence.slot = slot
        return batch

    def _in_order(self) -> list[Sequence]:
        return [self._running[number] for number in sorted(self._running)]

    def _make_room(self) -> None:
        """Let every running sequence have the block it goes on in; where there are too few, the last ones wait."""
        for sequence in self._in_order():
            while sequence.id in self._running and not sequence.grow(self._pool, sequence.length):
                self._preempt(self._running[max(self._running)])

    def _is_long(self, length: int) -> bool:
        """Whether contexts of so many tokens are rotated otherwise than short ones."""
        switch = self._decoder.switch
        return switch is not None and length > switch

    def _outgrows(self, sequence: Sequence) -> bool:
        """Whether the next step is the first of a longer context than the cached keys were rotated for. All are then
        computed again, as Transformers does for Phi-3."""
        return self._is_long(sequence.length) and not self._is_long(sequence.length - 1)

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self._drop(sequence)
        self._waiting.appendleft(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """Free what a sequence holds; a step in flight may still write to it, but those who come after write later."""
        if sequence.slot is not None:
            self._runner.leave(sequence)
        if sequence.state is not None:
            self._free_states.append(sequence.state)
        sequence.slot = sequence.state = None
        sequence.in_flight = 0
        sequence.release(self._pool)

    def _collect(self) -> list[Event]:
        """The tokens of the step in flight."""
        pending, self._pending = self._pending, None
        return [] if pending is None else self._read(pending)

    def _read(self, pending: Pending) -> list[Event]:
        """A step's tokens. If it was lost, all sequences are computed again from the tokens before it."""
        try:
            return self._take(pending.tokens())
        except StepLost:
            logger.warning(
                "pronghorn: programs of one launch waited for each other in vain (something else keeps the GPU's "
                "processors); from here on decoding takes more launches, and the lost step is done again"
            )
        self._pending = None  # it went on from the lost one
        self._runner.recover()
        for sequence in reversed(self._in_order()):
            self._preempt(sequence)
        return []

    def _take(self, chosen: list[tuple[Sequence, Token]]) -> list[Event]:
        """Append new tokens to their sequences, and let those go that end with them."""
        events = []
        for sequence, token in chosen:
            if sequence.id not in self._running:
                continue  # it ended, or was cancelled, while the step was on its way
            if sequence.in_flight:
                sequence.in_flight -= 1
                sequence.cached = len(sequence.tokens)
            sequence.tokens.append(token.id)
            sequence.publish(self._pool)
            reason: FinishReason | None = None
            if token.id in sequence.stops:
                reason = "stop"
            elif sequence.generated >= sequence.request.sampling.max_new_tokens:
                reason = "length"
            if reason is not None:
                del self._running[sequence.id]
                self._drop(sequence)
            events.append(Event(sequence.id, (token,), reason))
        return events


@contextmanager
def _outside_of_autograd() -> Iterator[None]:
    """No graph and no autocast; no inference mode either, whose tensors could not be trained on later."""
    with torch.inference_mode(False), torch.no_grad(), _without_autocast():
        yield


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Entering a context costs more than asking whether it is needed, at every step."""
    on = [kind for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)]
    with ExitStack() as off:
        for kind in on:
            off.enter_context(torch.autocast(kind, enabled=False))
        yield


def _runner(decoder: Decoder, cache: Cache, max_batch: int, max_context: int) -> Runner:
    """Recorded steps where there is a GPU that kernels can be compiled for."""
    if decoder.device.type != "cuda" or not probe().triton.value:
        return EagerRunner(decoder, cache)
    try:
        return CapturedRunner(decoder, cache, max_batch, max_context)
    except ValueError as reason:
        return _step_by_step(decoder, cache, reason)


def _step_by_step(decoder: Decoder, cache: Cache, reason: ValueError) -> Runner:
    """Where steps cannot be recorded."""
    logger.warning("pronghorn: decoding runs operation by operation: %s", reason)
    return EagerRunner(decoder, cache)


def _batch_and_room(decoder: Decoder, max_batch: int) -> tuple[int, int]:
    """How many requests run at a time, and the tokens whose keys and values fit into `CACHE_SHARE` of the memory that
    is free beside what recurrent layers remember: fewer requests than asked for where that would take over half."""
    if decoder.device.type == "cuda":
        free = gpu_memory(decoder.device).within_reach - torch.cuda.memory_allocated(decoder.device)
    else:
        free = available_host_bytes() // 4  # others run here, too
    room, state = int(free * CACHE_SHARE), state_bytes_per_sequence(decoder)
    if state:
        most = max(1, room // 2 // state - 1)  # one slot is for rows that hold no sequence
        if most < max_batch:
            logger.warning(
                "pronghorn: %d requests at a time, not %d: each takes %.0f MB for the states of recurrent layers",
                most,
                max_batch,
                state / 1e6,
            )
            max_batch = most
        room -= (max_batch + 1) * state
    return max_batch, room // cache_bytes_per_token(decoder)
