"""What a captured graph has baked in: compared before every replay, because a graph would not notice a change."""

from __future__ import annotations

from typing import Any

from torch import nn

#: PEFT's switches on an adapted layer: which adapters run, how strongly, and whether they are merged or off.
_ADAPTER_STATE = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")


def module_tree(model: nn.Module) -> list[nn.Module]:
    """The modules whose state `state_of` reads, in order."""
    return list(model.modules())


def state_of(modules: list[nn.Module]) -> list[Any]:
    """Everything of the modules that decides which kernels run on which memory.

    Training flags, hooks, replaced forwards, children, parameters and buffers with their memory, which are trained, and
    PEFT's switches. Compared with `==`; about a microsecond a module.
    """
    state: list[Any] = []
    for module in modules:
        own = module.__dict__
        children, parameters = own["_modules"], own["_parameters"]
        hooks = len(own["_forward_hooks"]) + len(own["_forward_pre_hooks"]) + len(own["_backward_hooks"])
        state.append((own["training"], hooks, len(own["_backward_pre_hooks"]), id(own.get("forward"))))
        if children:
            state.append([id(child) for child in children.values()])
        for parameter in parameters.values():
            if parameter is not None:
                hooked = bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
                state.append((parameter.data_ptr(), parameter.requires_grad, hooked))
        # Codes and scales of stored weights, which merging an adapter makes anew.
        state.extend(buffer.data_ptr() for buffer in own["_buffers"].values() if buffer is not None)
        if "scaling" in own:
            state.append([_copied(own.get(name)) for name in _ADAPTER_STATE])
    return state


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
