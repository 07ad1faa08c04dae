"""A decoder one layer at a time: what goes into each, what its parts read, gradients back through it.

Only one layer has to be on the device; the rows' hidden states wait on the host meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.errors import UnsupportedCheckpoint
from pronghorn.families import family_of


class _Recorder(nn.Module):
    """Stands for a layer: notes what it is called with, and hands the hidden states on, or others in their place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not as a child: its parameters stay out of the recording
        self.arguments: dict[str, Any] = {}
        self.given: Tensor | None = None
        self.handed_on: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments, self.given = arguments, hidden_states
        return hidden_states if self.handed_on is None else self.handed_on


@dataclass
class Decoder:
    """A causal LM that is run by its layers.

    Args:
        ids: calibration rows [R, S], without padding.
        tokens_at_once: that go through a layer together.
        device: where everything but the layers is brought to, and each layer while it is `placed`; None leaves all
            where it is.
    """

    model: Any
    ids: Tensor
    tokens_at_once: int = 4096
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self.layers = decoder_layers(self.model)
        self.chunks = self.ids.split(max(1, self.tokens_at_once // self.ids.shape[1]))
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        if self.device is not None:
            with self._recording():  # which hides the layers
                self.model.to(self.device)

    @torch.no_grad()
    def inputs(self) -> list[Tensor]:
        """What the first layer reads, a chunk of rows at a time; learns what all layers are called with."""
        found = []
        for chunk in self.chunks:
            with self._recording() as recorders:
                self._call(chunk, logits_to_keep=1)
            self._arguments[len(chunk)] = [recorder.arguments for recorder in recorders]
            assert recorders[0].given is not None
            found.append(recorders[0].given)
        return found

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """A layer's output for its input [rows, S, H]; it has to be where the rest of the model is."""
        output = self.layers[index](hidden, **self._arguments[len(hidden)][index])
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def placed(self, index: int) -> Iterator[nn.Module]:
        """A layer on the device for a while. What it holds elsewhere stays there, and is not written back."""
        layer = self.layers[index]
        if self.device is None:
            yield layer
            return
        held = [(tensor, tensor.data) for tensor in (*layer.parameters(), *layer.buffers())]
        for tensor, data in held:
            tensor.data = data.to(self.device)
        try:
            yield layer
        finally:
            for tensor, data in held:
                tensor.data = data

    def logits(self, chunk: Tensor, hidden: Tensor) -> Tensor:
        """The model's logits [rows, S, V] where its last layer gave `hidden`; differentiable in it."""
        with self._recording() as recorders:
            recorders[-1].handed_on = hidden
            return self._call(chunk).logits  # type: ignore[no-any-return]

    def _call(self, chunk: Tensor, **more: Any) -> Any:
        place = self.model.get_input_embeddings().weight.device
        return self.model(input_ids=chunk.to(place), use_cache=False, **more)

    @contextmanager
    def _recording(self) -> Iterator[list[_Recorder]]:
        layers = list(self.layers)
        recorders = [_Recorder(layer) for layer in layers]
        for index, recorder in enumerate(recorders):
            self.layers[index] = recorder
        try:
            yield recorders
        finally:
            for index, layer in enumerate(layers):
                self.layers[index] = layer


@contextmanager
def stock_forwards(model: nn.Module) -> Iterator[None]:
    """The forwards of the modules' classes for a while, where instances have others: a fast path runs whole models."""
    held = [
        (module, module.__dict__.pop("forward")) for module in model.modules() if "forward" in module.__dict__
    ]
    try:
        yield
    finally:
        for module, forward in held:
            module.__dict__["forward"] = forward


def decoder_layers(model: Any, asked: str = "dynamic_4bit") -> nn.ModuleList:
    """The list of a causal LM's decoder layers; `asked` is the argument that wants it.

    Raises:
        UnsupportedCheckpoint: when it has none of the expected length.
    """
    family = family_of(model.config.model_type)
    if family is not None and family.reads_images:  # whose vision tower may have as many
        return model.get_submodule(family.path).layers
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedCheckpoint(
        f"{type(model).__name__} has no list of decoder layers to quantise", fix=f"load it without {asked}"
    )


class Moments:
    """XᵀX / T of what each part reads, fp32 [in, in]; parts with the same input share one. `note` is called with every
    input while a layer runs.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._shared: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    def note(self, path: str, given: Tensor, *_: object) -> None:
        """What a part has read, [..., in]."""
        if self._last is not None and self._last[1] is given:
            self._shared[path] = self._last[0]
            return
        self._last = (path, given)
        rows = given.detach().reshape(-1, given.shape[-1]).float()
        total = self._sums.setdefault(path, rows.new_zeros(rows.shape[1], rows.shape[1]))
        total.addmm_(rows.t(), rows)
        self._tokens[path] = self._tokens.get(path, 0) + len(rows)

    def groups(self) -> list[tuple[list[str], Tensor]]:
        """Parts that read the same, in the order of their use, and their moment."""
        self._last = None
        return [
            ([path, *(p for p, first in self._shared.items() if first == path)], total / self._tokens[path])
            for path, total in self._sums.items()
        ]
