"""What a captured graph has baked in: compared before every replay, because a graph would not notice a change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

#: PEFT's switches on an adapted layer: which adapters run, how strongly, and whether they are merged or off.
_ADAPTER_STATE = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")

_TRAINING, _CHILDREN, _PARAMETERS, _BUFFERS = map(
    itemgetter, ("training", "_modules", "_parameters", "_buffers")
)
_HOOKS = [
    itemgetter(name)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
]


def module_tree(model: nn.Module) -> list[nn.Module]:
    """The modules whose state `state_of` reads, in order."""
    return list(model.modules())


def state_of(modules: Sequence[nn.Module]) -> list[Any]:
    """Everything of the modules that decides which kernels run on which memory.

    Training flags, hooks, replaced forwards, children, parameters and buffers with their memory, which are trained, and
    PEFT's switches. Compared with `==`. Kind by kind over all modules instead of module by module: most of it then runs
    in C, and a step that waits for the host (every one whose loss is logged) waits that much less.
    """
    own = [module.__dict__ for module in modules]
    children = list(map(_CHILDREN, own))
    parameters = [p for p in _values(map(_PARAMETERS, own)) if p is not None]
    return [
        list(map(_TRAINING, own)),
        # Most modules have neither hooks nor parameters of their own.
        *([len(found) for found in filter(None, map(hooks, own))] for hooks in _HOOKS),
        [id(attributes["forward"]) if "forward" in attributes else 0 for attributes in own],
        list(map(len, children)),
        list(map(id, _values(children))),
        list(map(Tensor.data_ptr, parameters)),
        [p.requires_grad for p in parameters],
        [bool(p._backward_hooks or p._post_accumulate_grad_hooks) for p in parameters],
        # Codes and scales of stored weights, which merging an adapter makes anew.
        [buffer.data_ptr() for buffer in _values(map(_BUFFERS, own)) if buffer is not None],
        [
            [_copied(attributes.get(name)) for name in _ADAPTER_STATE]
            for attributes in own
            if "scaling" in attributes
        ],
    ]


def _values(dicts: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """The values of all dicts, one after the other."""
    return chain.from_iterable(map(dict.values, filter(None, dicts)))


def has_hooks(module: nn.Module) -> bool:
    """Whether Python code of somebody's runs with each call of the module, which a graph would run only once."""
    own = module.__dict__
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parameters = [p for p in own["_parameters"].values() if p is not None]
    return any(own[kind] for kind in kinds) or any(
        p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters
    )


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value
