"""An adapter on a base that is afterwards what it was, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils import ModulesToSaveWrapper

from pronghorn.loading import FastLanguageModel


@contextmanager
def adapted(base: Any, **adapter: Any) -> Iterator[Any]:
    """The base with a new adapter, the arguments being those of `FastLanguageModel.get_peft_model`; at the end without.

    Nothing is written into the base's tensors, which other processes may be reading: what an adapter trains of the base
    itself (`bias`) is trained in a copy. The tensors are put back, also those for which the adapter's beginning puts
    others (PiSSA), and modules trained whole (`modules_to_save`), which PEFT's own unloading leaves as they are then.
    """
    before = [(parameter, parameter.data) for parameter in base.parameters()]
    model = FastLanguageModel.get_peft_model(base, **adapter)
    own = {id(parameter) for parameter, _ in before}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) in own]
    for parameter in trained:
        parameter.data = parameter.data.clone()
    # Only those: weights that training lays side by side stay there, and their former places are given back.
    replaced = [(p, data) for p, data in before if p.data_ptr() != data.data_ptr()]
    del before
    whole = {
        name: module.original_module
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    try:
        yield model
    finally:
        model.unload()
        for name, module in whole.items():
            base.set_submodule(name, module)
        for parameter, data in replaced:
            parameter.data = data
        for parameter in trained:
            parameter.requires_grad_(False)
