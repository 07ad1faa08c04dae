"""Forward and backward of one micro-batch with static shapes: run eagerly, or replayed as a CUDA graph.

    gradients += d loss / d parameters,    loss = Σ CE over the supervised tokens / normalizer

A step's kernels are recorded once for a batch's shape and then launched as one graph, so that the host costs nothing
(1.5B, 2,048 tokens: about 3,000 launches, the host needs twice as long as the GPU). The graph reads its inputs from
tensors of its own and adds into gradient buffers that stay where they are; clipping, schedule and optimizer remain the
caller's. Eager execution runs the same code on the same buffers and is the reference.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.blocks import ModuleProjection
from pronghorn.blocks.levels import is_roomy
from pronghorn.engine.binding import Binding
from pronghorn.engine.flat import FlatAdapters, lay_out
from pronghorn.engine.joined import join_weights
from pronghorn.engine.planning import reserve_host
from pronghorn.engine.signature import has_hooks, module_tree, state_of
from pronghorn.engine.tasks import CAPTURABLE, NUMBERS, LanguageTask, Task

logger = logging.getLogger("pronghorn")

#: Graphs kept at most. One costs its kernels' parameters (some 10 MiB), all share one memory pool.
MAX_GRAPHS = 32
#: Gradients of this size are copied before an eager micro-batch adds to them, so that it can be tried again in parts.
_GUARDED_BYTES = 512 * 2**20


@dataclass
class _Graph:
    """A recorded pass. `trained`: inputs whose gradients it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    counts: tuple[Tensor, ...]
    output: Any
    trained: list[str] = field(default_factory=list)


class TrainingStep:
    """Runs micro-batches of a bound model and leaves their gradients in `.grad`.

    Gradients are added to what `.grad` holds, as `backward` does; `zero_grad` in between is the caller's, with or
    without `set_to_none`. A change to the model (an adapter switched, a hook, a parameter frozen or moved, a save
    level) is noticed before the next micro-batch, and the graphs are made anew.

    Args:
        model: a bound model, or the PEFT model around it.
        capture: replay CUDA graphs where possible; False always runs eagerly.
        around: context in which the model is called (autocast).
        task: what is computed; None: a causal LM's loss.
    """

    def __init__(
        self,
        model: Any,
        *,
        capture: bool = True,
        around: Callable[[], AbstractContextManager] = nullcontext,
        task: Task | None = None,
    ) -> None:
        self.task = LanguageTask(model) if task is None else task
        self.model, self.capture = model, capture
        self._around = around
        self._flat: list[FlatAdapters | None] = [None for _ in self.task.bindings]
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._tree: list[nn.Module] = []
        self._state: list[Any] = []
        self._chosen: tuple[Any, ...] = ()
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._warm: set[frozenset[str]] = set()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._model_reason: str | None = None
        self._looked_at = False
        self.reason: str | None = None
        self.captured, self.capture_seconds = 0, 0.0
        #: False once memory has run out in the middle of adding to gradients that could not be put back
        self.gradients_intact = True

    # --- what runs --------------------------------------------------------------------------------------------

    def run(self, batch: Mapping[str, Any], normalizer: Any) -> Any:
        """Forward and backward of a batch; what the task gives (`StepOutput`), or None.

        None where the batch or the model asks for something else, which `reason` names; nothing has happened then, and
        the model's ordinary call is the way to go.

        Args:
            normalizer: what loss and gradients are divided by, a number or a 0-dim tensor; a tuple where the task
                has several losses.

        Raises:
            torch.OutOfMemoryError: gradients are as they were before, unless `gradients_intact` is False.
        """
        if not self.takes(batch):
            return None
        accumulating = self._attach()
        values = normalizer if isinstance(normalizer, tuple) else (normalizer,)
        if not self._captures(batch):
            return self._run_eagerly(batch, values, accumulating)
        with self._around():
            inputs = self.task.inputs(batch)
        graph = self._graph_for(inputs, batch, len(values))
        if graph is None:
            return self._run_eagerly(batch, values, accumulating)
        for name, held in graph.inputs.items():
            held.detach().copy_(inputs[name].detach(), non_blocking=True)
        for count, value in zip(graph.counts, values, strict=True):
            _set(count, value)
        graph.graph.replay()
        if graph.trained:
            # What stands in front of the recorded part goes on from its gradients.
            gradients = [graph.inputs[name].grad for name in graph.trained]
            torch.autograd.backward([inputs[name] for name in graph.trained], gradients)
        return _of_the_caller(graph.output, Tensor.clone)

    def takes(self, batch: Mapping[str, Any]) -> bool:
        """Whether `run` runs a batch; `reason` says why not."""
        self._settle()
        self.reason = self._model_reason or self.task.why_another_batch(batch)
        return self.reason is None

    def _run_eagerly(self, batch: Mapping[str, Any], values: tuple[Any, ...], accumulating: bool) -> Any:
        """Without a graph; when memory runs out on the way, gradients are put back as they were where that is cheap."""
        device = self._device
        size = sum(buffer.nbytes for _, buffer in self._gradients)
        guard = accumulating and _guards(device) and size <= _GUARDED_BYTES
        before = [buffer.clone() for _, buffer in self._gradients] if guard else []
        counts = _ones(len(values), device)
        for count, value in zip(counts, values, strict=True):
            _set(count, value)
        try:
            return self._execute(batch, counts)
        except torch.OutOfMemoryError:
            self.gradients_intact = guard or not accumulating
            for index, (_, buffer) in enumerate(self._gradients):
                _set(buffer, before[index] if guard else 0.0)
            raise

    def _execute(self, batch: Mapping[str, Any], counts: tuple[Tensor, ...]) -> Any:
        with self._packed():
            with self._around():
                output: Any = self.task.forward(batch, counts)
            if "loss" in output._fields:
                output.loss.backward()
        return _of_the_caller(output, Tensor.detach)

    @contextmanager
    def _packed(self) -> Iterator[None]:
        for binding, flat in zip(self.task.bindings, self._flat, strict=True):
            if flat is not None:
                flat.refresh()
            binding.packed = flat
        try:
            yield
        finally:
            for binding in self.task.bindings:
                binding.packed = None

    # --- gradients --------------------------------------------------------------------------------------------

    def lay_out(self) -> None:
        """Put weights, adapters and gradients where steps want them, so that their memory is taken."""
        self._settle()

    def _settle(self) -> None:
        """Make or renew everything that depends on the model's state."""
        if self._unchanged():
            return
        # An evaluation in between is no change. Every module is set, whatever the flag of the outermost one says:
        # PEFT's is on while the model inside is as it was loaded.
        self.model.train()
        if self._unchanged():
            return
        if self._graphs:
            logger.warning("pronghorn: the model has changed: its captured steps are made anew")
        self.release()
        self._model_reason, self._looked_at = self.task.why_another_call(), False
        if self._model_reason is None:
            self._lay_out()
        self._tree = module_tree(self.model)
        self._state, self._chosen = state_of(self._tree), self._choices()

    def _unchanged(self) -> bool:
        return bool(self._state) and self._state == state_of(self._tree) and self._chosen == self._choices()

    def _choices(self) -> tuple[Any, ...]:
        return tuple((b.save_levels, b.tile_rows, b.attention) for b in self.task.bindings)

    def _lay_out(self) -> None:
        device = self._device
        self._flat = [self._flat_of(binding, device) for binding in self.task.bindings]
        buffers = {
            parameter: buffer
            for flat in self._flat
            if flat is not None
            for parameter, buffer in zip(flat.parameters, flat.gradient_of(), strict=True)
        }
        self._gradients = [
            (p, buffers[p] if p in buffers else torch.zeros_like(p, memory_format=torch.contiguous_format))
            for p in self.model.parameters()
            if p.requires_grad
        ]

    def _flat_of(self, binding: Binding, device: torch.device) -> FlatAdapters | None:
        groups = binding.all_groups()
        join_weights(groups, roomy=is_roomy(binding.save_levels), spare=binding.spare)
        binding.laid_out = True
        return lay_out(groups, self._compute_dtype(binding, device))

    def _compute_dtype(self, binding: Binding, device: torch.device) -> torch.dtype:
        with self._around():
            if torch.is_autocast_enabled(device.type):
                return torch.get_autocast_dtype(device.type)
        dtype: torch.dtype = binding.weight_dtype or binding.model.get_input_embeddings().weight.dtype
        return dtype

    def _attach(self) -> bool:
        """Every `.grad` is our buffer, holding what it held before; returns whether any held something."""
        if all(p.grad is None for p, _ in self._gradients):
            mine: set[int] = set()
            for flat in filter(None, self._flat):
                flat.gradients.zero_()
                mine |= set(map(id, flat.parameters))
            for parameter, buffer in self._gradients:
                if id(parameter) not in mine:
                    buffer.zero_()
                parameter.grad = buffer
            return False
        for parameter, buffer in self._gradients:
            if parameter.grad is None:
                buffer.zero_()
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        return True

    # --- capture ----------------------------------------------------------------------------------------------

    def why_eager(self, device: torch.device) -> str | None:
        """Why steps of this model are not captured, or None."""
        if device.type != "cuda":
            return f"CUDA graphs need a CUDA GPU, the model is on the {device.type.upper()}"
        hooked = next((name for name, module in self.model.named_modules() if has_hooks(module)), None)
        if hooked is not None:
            return f"{hooked} has hooks, which a graph would run only once"
        return next(filter(None, (self._why_eager(binding, device) for binding in self.task.bindings)), None)

    def _why_eager(self, binding: Binding, device: torch.device) -> str | None:
        dtype = self._compute_dtype(binding, device)
        for window in binding.windowed():
            backend = binding.attention_backend(device, dtype, binding.head_dim, window=window)
            if backend not in CAPTURABLE:
                return f"attention runs as '{backend}', document by document"
        rope = getattr(binding.config, "rope_parameters", None) or {}
        # One kind of angles, or several by the layers' names.
        if any(
            kind.get("rope_type") == "dynamic" for kind in (rope, *rope.values()) if isinstance(kind, dict)
        ):
            return "rope type 'dynamic' depends on each batch's longest row"
        for _, projection in binding.projections():
            if isinstance(projection, ModuleProjection):
                return f"a projection runs through its own module: {projection.reason}"
            if any(adapter.dropout for adapter in projection.adapters):
                return "adapter dropout draws its masks from the host's random numbers"
        return None

    def _captures(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch of this kind is recorded. Why it is not is told once."""
        if not self.capture:
            return False
        if not self._looked_at:
            self._looked_at = True
            reason = self.why_eager(self._device)
            if reason is not None:
                self._give_up(reason)
                return False
        reason = self.task.why_eager(batch)
        if reason is not None:
            self._tell(f"such batches are launched kernel by kernel instead of as one CUDA graph: {reason}")
        return reason is None

    def _tell(self, reason: str) -> None:
        self.task.bindings[0].tell_once(reason)

    def _give_up(self, reason: str) -> None:
        self.capture = False
        self._tell(f"steps are launched kernel by kernel instead of as one CUDA graph: {reason}")

    def _graph_for(
        self, inputs: dict[str, Tensor], batch: Mapping[str, Any], counts: int = 1
    ) -> _Graph | None:
        """The graph of a batch's shape, captured at the first meeting; None where it has to run eagerly."""
        numbers = {name: batch[name] for name in NUMBERS if name in batch}
        shapes = ((name, x.shape, x.requires_grad) for name, x in sorted(inputs.items()))
        key = (*shapes, *numbers.values())
        graph = self._graphs.get(key)
        if graph is not None:
            return graph
        if len(self._graphs) >= MAX_GRAPHS:
            self._tell(f"{MAX_GRAPHS} shapes of batches are captured; further ones run eagerly")
            return None
        try:
            return self._capture(key, inputs, numbers, counts)
        except Exception as error:
            self.release()
            ran_out = _out_of_memory(error)
            if ran_out is not None:
                raise ran_out from None
            first_line = str(error).partition("\n")[0]
            self._give_up(f"the capture failed ({type(error).__name__}: {first_line})")
        return None

    def _capture(
        self, key: tuple[Any, ...], given: dict[str, Tensor], numbers: dict[str, int], counted: int
    ) -> _Graph:
        began = time.perf_counter()
        device = self._device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        kind = frozenset(given)
        if kind not in self._warm:
            # Compiles and loads kernels, creates library handles and workspaces.
            self._warm.add(kind)
            self._run_for_nothing(self.task.warm_up(device, kind), counted, self._stream)
        # Nothing can be pinned while a graph is recorded.
        reserve_host(*self.task.parked(given))
        inputs = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in given.items()}
        counts = _ones(counted, device)
        graph = torch.cuda.CUDAGraph()
        # Random numbers drawn while recording must not shift those of the run. "relaxed": other threads (pinning of
        # batches) may allocate meanwhile, and kernels met for the first time may be loaded.
        with torch.random.fork_rng(devices=[device]):
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"):
                if not self._graphs:
                    # Given back at once: what follows is cut out of one segment instead of rounded up to its own.
                    torch.empty(self._piece, dtype=torch.uint8, device=device)
                output = self._execute({**inputs, **numbers}, counts)
        trained = [name for name, x in inputs.items() if x.grad is not None]
        captured = _Graph(graph, inputs, counts, output, trained)
        self._graphs[key] = captured
        self.captured += 1
        self.capture_seconds += time.perf_counter() - began
        return captured

    def rehearse(self, batch: Mapping[str, Any], counts: int = 1) -> None:
        """Take the memory of the largest batch before the first one comes: its graph, or an eager pass over nothing.

        Args:
            batch: of the largest sizes; its values do not matter.
            counts: how many numbers losses are divided by.

        Raises:
            torch.OutOfMemoryError: it does not fit; everything taken is given back.
        """
        self._settle()
        if self._model_reason is not None:
            return
        try:
            recorded = self._captures(batch) and self._graph_for(self.task.inputs(batch), batch, counts)
            if not recorded:
                device = self._device
                stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
                self._run_for_nothing(batch, counts, stream)
        except torch.OutOfMemoryError:
            self.release()
            raise

    def _run_for_nothing(
        self, batch: Mapping[str, Any], counts: int, stream: torch.cuda.Stream | None
    ) -> None:
        """Run a batch eagerly and forget its gradients and random numbers."""
        device = self._device
        before = [(p, p.grad) for p, _ in self._gradients]
        held = [(buffer, buffer.clone()) for p, buffer in self._gradients if p.grad is buffer]
        for parameter, buffer in self._gradients:
            parameter.grad = buffer
        devices = [device] if device.type == "cuda" else []
        if stream is not None:
            # The batch and the copies above are made on the current stream, and on a busy GPU later: the other stream
            # would read what the batch's memory held before, ids of no token, and add to gradients not yet copied.
            stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.random.fork_rng(devices=devices), torch.cuda.stream(stream):
                self._execute(batch, _ones(counts, device))
        finally:
            if stream is not None:
                # What is put back below must come after the last gradient that was added over there.
                torch.cuda.current_stream(device).wait_stream(stream)
            for parameter, gradient in before:
                parameter.grad = gradient
            for buffer, values in held:
                buffer.copy_(values)

    @property
    def _piece(self) -> int:
        return max(binding.piece for binding in self.task.bindings)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def flats(self) -> list[FlatAdapters]:
        """Flat adapters that are as they were laid out, their gradients with them."""
        buffers = {id(p): buffer for p, buffer in self._gradients}
        return [
            flat
            for flat in self._flat
            if flat is not None
            and flat.holds_values()
            and all(p.grad is buffers.get(id(p)) for p in flat.parameters)
        ]

    def whole_gradient(self) -> Tensor | None:
        """The gradient of everything that is trained as one tensor, where it is one."""
        flats = self.flats()
        whole = len(flats) == 1 and len(flats[0].parameters) == len(self._gradients)
        return flats[0].gradients if whole else None

    @property
    def holds_graphs(self) -> bool:
        """Whether captured steps take memory now."""
        return bool(self._graphs)

    def release(self) -> None:
        """Give back the graphs and their memory, and what is left of one that failed."""
        if self._graphs or self._stream is not None:
            self._graphs.clear()
            self._warm.clear()
            self._pool = self._stream = None
            gc.collect()
            torch.cuda.empty_cache()


def _out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The error itself, or the one that it hides: the end of a recording that memory ran out in complains of streams
    that were not joined."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error


def _ones(count: int, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.ones((), dtype=torch.float32, device=device) for _ in range(count))


def _of_the_caller(output: Any, made: Callable[[Tensor], Tensor]) -> Any:
    """A task's output with every tensor detached, or copied."""
    return type(output)(*map(made, output))


def _guards(device: torch.device) -> bool:
    """Whether memory can run out in a way that Python sees."""
    return device.type == "cuda"


def _set(held: Tensor, value: Any) -> Tensor:
    """Write a number or a tensor without waiting for the device."""
    return held.copy_(value, non_blocking=True) if isinstance(value, Tensor) else held.fill_(float(value))
