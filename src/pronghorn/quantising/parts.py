"""What of a decoder layer can be brought into 4 bits: its linear modules, and the stacks of a mixture's experts.

A stack [E, out, in] is one matrix [E · out, in], all of whose experts read alike: what any of them reads counts for
all. Its products are found where Transformers' own experts make them, one expert after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pronghorn.quantising.formats import Stored
from pronghorn.quantising.store import four_bit_linear
from pronghorn.weights.experts import hold_packed

#: (path, what was multiplied [tokens, in], what came of it [tokens, out], the expert, 0 of a linear module)
Note = Callable[[str, Tensor, Tensor, int], None]
#: of a layer's experts
_STACKS = ("gate_up_proj", "down_proj")


class Part(Protocol):
    """A weight of a layer, as a matrix [out, in]."""

    @property
    def weight(self) -> Tensor: ...

    def copy_(self, values: Tensor) -> None:
        """Other values in the weight's place."""

    def store(self, layer: nn.Module, path: str, stored: Stored) -> None:
        """Hold the weight in 4 bits from now on."""


class LinearPart:
    """A linear module."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    def copy_(self, values: Tensor) -> None:
        self.module.weight.copy_(values)

    def store(self, layer: nn.Module, path: str, stored: Stored) -> None:
        layer.set_submodule(path, four_bit_linear(self.module, stored, self.module.weight.dtype))


class StackPart:
    """A stack [E, out, in] of a module of experts."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        self.experts, self.name = experts, name

    @property
    def stack(self) -> Tensor:
        return self.experts._parameters[self.name]  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        return self.stack.flatten(0, 1)

    def copy_(self, values: Tensor) -> None:
        self.stack.copy_(values.view(self.stack.shape))

    def store(self, layer: nn.Module, path: str, stored: Stored) -> None:
        packed, state = stored.pack(self.stack.dtype)
        state.shape = self.stack.shape
        hold_packed(self.experts, self.name, packed, state)


def parts_of(layer: nn.Module) -> dict[str, Part]:
    """By their path in the layer: linear modules by their own, stacks by their parameter's."""
    found: dict[str, Part] = {}
    for path, module in layer.named_modules():
        if type(module) is nn.Linear:
            found[path] = LinearPart(module)
        stacks = [name for name in _STACKS if getattr(module._parameters.get(name), "ndim", 0) == 3]
        found |= {f"{path}.{name}": StackPart(module, name) for name in stacks}
    return found


@contextmanager
def watching(parts: dict[str, Part], note: Note) -> Iterator[None]:
    """Tell `note` of every product of the parts while the layer runs."""
    stacks = {path: part for path, part in parts.items() if isinstance(part, StackPart)}
    hooks = [
        part.module.register_forward_hook(_on_linear(path, note))
        for path, part in parts.items()
        if isinstance(part, LinearPart)
    ]
    try:
        if not stacks:
            yield
        else:
            with _one_by_one(stacks), _StackProducts(stacks, note):
                yield
    finally:
        for hook in hooks:
            hook.remove()


def _on_linear(path: str, note: Note) -> Callable[..., None]:
    def on_output(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        note(path, arguments[0], output, 0)

    return on_output


@contextmanager
def _one_by_one(stacks: dict[str, StackPart]) -> Iterator[None]:
    """Transformers' experts run one after the other meanwhile, whatever they were set to."""
    configs = {id(part.experts.config): part.experts.config for part in stacks.values()}
    held = [(config, config._experts_implementation) for config in configs.values()]
    for config, _ in held:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in held:
            config._experts_implementation = implementation


class _StackProducts(TorchFunctionMode):
    """Finds the products whose weight is a part of a stack, by where it lies."""

    def __init__(self, stacks: dict[str, StackPart], note: Note) -> None:
        super().__init__()
        self.stacks, self.note = stacks, note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            given, weight = args[:2]
            for path, part in self.stacks.items():
                stack = part.stack
                offset = weight.data_ptr() - stack.data_ptr()
                if 0 <= offset < stack.nbytes and weight.device == stack.device:
                    self.note(path, given, output, offset // stack[0].nbytes)
        return output
