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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.blocks import ModuleProjection
from pronghorn.blocks.levels import is_roomy
from pronghorn.engine.altered import altered_part
from pronghorn.engine.bind import binding_of
from pronghorn.engine.flat import FlatAdapters, lay_out
from pronghorn.engine.forward import readable_head
from pronghorn.engine.joined import join_weights
from pronghorn.engine.planning import reserve_host
from pronghorn.engine.read import Reading
from pronghorn.engine.signature import has_hooks, module_tree, state_of

logger = logging.getLogger("pronghorn")

#: Tensors of a batch that a graph reads; everything else that it may hold besides is in `_HOST`.
_TENSORS = ("input_ids", "labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "loss_rows")
_HOST = ("max_length_q", "max_length_k", "document_lengths")
#: What batches with images have besides. The vision tower's shapes are those of the images: no graph is made of them.
_IMAGES = (
    "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "token_type_ids",
)  # fmt: skip
#: Attention implementations that ask the host for nothing but the longest document.
_CAPTURABLE = ("flash", "cudnn", "flex")
#: Graphs kept at most. One costs its kernels' parameters (some 10 MiB), all share one memory pool.
MAX_GRAPHS = 32
#: Gradients of this size are copied before an eager micro-batch adds to them, so that it can be tried again in parts.
_GUARDED_BYTES = 512 * 2**20
#: Tokens of the batch that compiles and loads every kernel before the first capture.
_REHEARSAL_TOKENS = 256


@dataclass(frozen=True)
class StepOutput:
    """The micro-batch's loss (0-dim fp32) and the number of right predictions (0-dim int64), both the caller's."""

    loss: Tensor
    num_correct: Tensor


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    normalizer: Tensor
    output: StepOutput


class TrainingStep:
    """Runs micro-batches of a bound model and leaves their gradients in `.grad`.

    Gradients are added to what `.grad` holds, as `backward` does; `zero_grad` in between is the caller's, with or
    without `set_to_none`. A change to the model (an adapter switched, a hook, a parameter frozen or moved, a save
    level) is noticed before the next micro-batch, and the graphs are made anew.

    Args:
        model: a bound model, or the PEFT model around it.
        capture: replay CUDA graphs where possible; False always runs eagerly.
        around: context in which the model is called (autocast).
    """

    def __init__(
        self, model: Any, *, capture: bool = True, around: Callable[[], AbstractContextManager] = nullcontext
    ) -> None:
        binding = binding_of(model)
        assert binding is not None and binding.bound
        self.model, self.binding, self.capture = model, binding, capture
        self._around = around
        self._flat: FlatAdapters | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._tree: list[nn.Module] = []
        self._state: list[Any] = []
        self._chosen: tuple[Any, ...] = ()
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._model_reason: str | None = None
        self.reason: str | None = None
        self.captured, self.capture_seconds = 0, 0.0
        #: False once memory has run out in the middle of adding to gradients that could not be put back
        self.gradients_intact = True

    # --- what runs --------------------------------------------------------------------------------------------

    def run(self, batch: Mapping[str, Any], normalizer: Any) -> StepOutput | None:
        """Forward and backward of a batch, loss and gradients divided by `normalizer` (a number or a 0-dim tensor).

        None where the batch or the model asks for something else, which `reason` names; nothing has happened then, and
        the model's ordinary call is the way to go.

        Raises:
            torch.OutOfMemoryError: gradients are as they were before, unless `gradients_intact` is False.
        """
        self._settle()
        self.reason = self._model_reason or _why_another_batch(batch)
        if self.reason is not None:
            return None
        accumulating = self._attach()
        graph = self._graph_for(batch) if self.capture and not self._has_images(batch) else None
        if graph is None:
            return self._run_eagerly(batch, normalizer, accumulating)
        for name, held in graph.inputs.items():
            held.copy_(batch[name], non_blocking=True)
        _set(graph.normalizer, normalizer)
        graph.graph.replay()
        return StepOutput(graph.output.loss.clone(), graph.output.num_correct.clone())

    def _run_eagerly(self, batch: Mapping[str, Any], normalizer: Any, accumulating: bool) -> StepOutput:
        """Without a graph; when memory runs out on the way, gradients are put back as they were where that is cheap."""
        device = batch["input_ids"].device
        size = sum(buffer.nbytes for _, buffer in self._gradients)
        guard = accumulating and _guards(device) and size <= _GUARDED_BYTES
        before = [buffer.clone() for _, buffer in self._gradients] if guard else []
        try:
            return self._execute(batch, _set(torch.ones((), device=device), normalizer))
        except torch.OutOfMemoryError:
            self.gradients_intact = guard or not accumulating
            for index, (_, buffer) in enumerate(self._gradients):
                _set(buffer, before[index] if guard else 0.0)
            raise

    def _execute(self, batch: Mapping[str, Any], normalizer: Tensor) -> StepOutput:
        with self._packed():
            with self._around():
                outputs = self.model(**batch, num_items_in_batch=normalizer, use_cache=False)
            outputs.loss.backward()
        return StepOutput(outputs.loss.detach(), outputs.num_correct)

    @contextmanager
    def _packed(self) -> Iterator[None]:
        if self._flat is not None:
            self._flat.refresh()
        self.binding.packed = self._flat
        try:
            yield
        finally:
            self.binding.packed = None

    def _has_images(self, batch: Mapping[str, Any]) -> bool:
        if not any(name in batch for name in _IMAGES):
            return False
        if next(iter(batch.values())).is_cuda:
            self.binding.tell_once(
                "batches with images are launched kernel by kernel: the vision tower's shapes change with them"
            )
        return True

    # --- gradients --------------------------------------------------------------------------------------------

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
        self._model_reason = self._why_another_call()
        if self._model_reason is None:
            self._lay_out()
        self._tree = module_tree(self.model)
        self._state, self._chosen = state_of(self._tree), self._choices()

    def _unchanged(self) -> bool:
        return bool(self._state) and self._state == state_of(self._tree) and self._chosen == self._choices()

    def _choices(self) -> tuple[Any, ...]:
        return self.binding.save_levels, self.binding.tile_rows, self.binding.attention

    def _why_another_call(self) -> str | None:
        """Why the model's loss is not the blocks' and the fused head's, or None."""
        binding = self.binding
        altered = altered_part(binding.decoder, binding.family.parts, binding.family.mixture)
        if altered is not None:
            return altered
        if "_loss_function" in binding.model.__dict__ or readable_head(binding.model, binding) is None:
            return "lm_head or the loss runs through its own forward"
        return None

    def _lay_out(self) -> None:
        device = next(self.model.parameters()).device
        groups = {
            (self.binding.layer_index(layer), slot): found
            for layer in self.binding.layers
            for slot, found in self.binding.groups(layer, Reading(True)).items()
        }
        join_weights(groups, roomy=is_roomy(self.binding.save_levels))
        self._flat = lay_out(groups, self._compute_dtype(device))
        buffers = (
            {}
            if self._flat is None
            else dict(zip(self._flat.parameters, self._flat.gradient_of(), strict=True))
        )
        self._gradients = [
            (p, buffers[p] if p in buffers else torch.zeros_like(p, memory_format=torch.contiguous_format))
            for p in self.model.parameters()
            if p.requires_grad
        ]

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        with self._around():
            if torch.is_autocast_enabled(device.type):
                return torch.get_autocast_dtype(device.type)
        return self.binding.weight_dtype or self.binding.model.get_input_embeddings().weight.dtype

    def _attach(self) -> bool:
        """Every `.grad` is our buffer, holding what it held before; returns whether any held something."""
        if all(p.grad is None for p, _ in self._gradients):
            if self._flat is not None:
                self._flat.gradients.zero_()
                mine = set(map(id, self._flat.parameters))
            else:
                mine = set()
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
        binding = self.binding
        hooked = next((name for name, module in self.model.named_modules() if has_hooks(module)), None)
        if hooked is not None:
            return f"{hooked} has hooks, which a graph would run only once"
        dtype = self._compute_dtype(device)
        for window in binding.windowed():
            backend = binding.attention_backend(device, dtype, binding.head_dim, window=window)
            if backend not in _CAPTURABLE:
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

    def _graph_for(self, batch: Mapping[str, Any]) -> _Graph | None:
        """The graph of a batch's shape, captured at the first meeting; None where it has to run eagerly."""
        sizes = [batch[name].shape[-1] for name in ("input_ids", "loss_rows", "cu_seq_lens_q")]
        key = (*sizes, int(batch["max_length_q"]))
        graph = self._graphs.get(key)
        if graph is not None:
            return graph
        device = batch["input_ids"].device
        reason = self.why_eager(device)
        if reason is None and len(self._graphs) >= MAX_GRAPHS:
            self.binding.tell_once(f"{MAX_GRAPHS} shapes of batches are captured; further ones run eagerly")
            return None
        if reason is None:
            try:
                return self._capture(key, batch)
            except torch.OutOfMemoryError:
                self.release()
                raise
            except Exception as error:
                first_line = str(error).partition("\n")[0]
                reason = f"the capture failed ({type(error).__name__}: {first_line})"
                self.release()
        self.capture = False
        self.binding.tell_once(f"steps are launched kernel by kernel instead of as one CUDA graph: {reason}")
        return None

    def _capture(self, key: tuple[int, ...], batch: Mapping[str, Any]) -> _Graph:
        began = time.perf_counter()
        device = batch["input_ids"].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
            # Compiles and loads kernels, creates library handles and workspaces.
            small = _nonsense(device, _REHEARSAL_TOKENS, _REHEARSAL_TOKENS // 2, 2, _REHEARSAL_TOKENS // 2)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self._run_for_nothing(small, self._stream)
        # Nothing can be pinned while a graph is recorded.
        reserve_host(self.binding, batch["input_ids"].numel())
        inputs = {name: batch[name].clone() for name in _TENSORS}
        static = {
            **inputs,
            **{name: batch[name] for name in ("max_length_q", "max_length_k") if name in batch},
        }
        normalizer = torch.ones((), dtype=torch.float32, device=device)
        graph = torch.cuda.CUDAGraph()
        # Random numbers drawn while recording must not shift those of the run. "relaxed": other threads (pinning of
        # batches) may allocate meanwhile, and kernels met for the first time may be loaded.
        with torch.random.fork_rng(devices=[device]):
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"):
                output = self._execute(static, normalizer)
        captured = _Graph(graph, inputs, normalizer, output)
        self._graphs[key] = captured
        self.captured += 1
        self.capture_seconds += time.perf_counter() - began
        return captured

    def rehearse(self, tokens: int, loss_rows: int, documents: int, longest: int) -> None:
        """Take the memory of the largest batch before the first one comes: its graph, or an eager pass over nothing.

        Raises:
            torch.OutOfMemoryError: it does not fit; everything taken is given back.
        """
        self._settle()
        if self._model_reason is not None:
            return
        device = next(self.model.parameters()).device
        batch = _nonsense(device, tokens, loss_rows, documents, longest)
        try:
            if not self.capture or self._graph_for(batch) is None:
                self._run_for_nothing(
                    batch, torch.cuda.current_stream(device) if device.type == "cuda" else None
                )
        except torch.OutOfMemoryError:
            self.release()
            raise

    def _run_for_nothing(self, batch: dict[str, Any], stream: torch.cuda.Stream | None) -> None:
        """Run a batch eagerly and forget its gradients and random numbers."""
        device = batch["input_ids"].device
        before = [(p, p.grad) for p, _ in self._gradients]
        held = [(buffer, buffer.clone()) for p, buffer in self._gradients if p.grad is buffer]
        for parameter, buffer in self._gradients:
            parameter.grad = buffer
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), torch.cuda.stream(stream):
                self._execute(batch, torch.ones((), device=device))
        finally:
            if stream is not None:
                # What is put back below must come after the last gradient that was added over there.
                torch.cuda.current_stream(device).wait_stream(stream)
            for parameter, gradient in before:
                parameter.grad = gradient
            for buffer, values in held:
                buffer.copy_(values)

    @property
    def holds_graphs(self) -> bool:
        """Whether captured steps take memory now."""
        return bool(self._graphs)

    def release(self) -> None:
        """Give back the graphs and their memory."""
        if self._graphs:
            self._graphs.clear()
            self._pool = self._stream = None
            gc.collect()
            torch.cuda.empty_cache()


def _nonsense(
    device: torch.device, tokens: int, loss_rows: int, documents: int, longest: int
) -> dict[str, Any]:
    """A batch of a shape, of nothing but the first token."""
    documents = max(documents, -(-tokens // longest))
    zeros = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    bounds = torch.arange(documents + 1, device=device).mul_(longest).clamp_(max=tokens).to(torch.int32)
    return {
        "input_ids": zeros,
        "labels": zeros,
        "position_ids": torch.arange(tokens, device=device)[None] % longest,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "loss_rows": torch.arange(loss_rows, device=device),
        "max_length_q": longest,
        "max_length_k": longest,
        "document_lengths": tuple(max(min(longest, tokens - longest * i), 0) for i in range(documents)),
    }


def _why_another_batch(batch: Mapping[str, Any]) -> str | None:
    """Why a batch is not one packed stream of tokens, or None."""
    unknown = sorted(set(batch) - {*_TENSORS, *_HOST, *_IMAGES})
    missing = [name for name in (*_TENSORS, "max_length_q") if name not in batch]
    if not unknown and not missing:
        return None
    named = "has " + ", ".join(unknown) if unknown else "lacks " + ", ".join(missing)
    return f"the batch {named}: a step of static shape takes one packed stream of tokens"


def _guards(device: torch.device) -> bool:
    """Whether memory can run out in a way that Python sees."""
    return device.type == "cuda"


def _set(held: Tensor, value: Any) -> Tensor:
    """Write a number or a tensor without waiting for the device."""
    return held.copy_(value, non_blocking=True) if isinstance(value, Tensor) else held.fill_(float(value))
