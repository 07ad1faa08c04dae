"""An adapter on a base that is afterwards what it was, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper

from pronghorn.loading import FastLanguageModel


@contextmanager
def adapted(base: Any, **adapter: Any) -> Iterator[Any]:
    """The base with a new adapter, the arguments being those of `FastLanguageModel.get_peft_model`; at the end without.

    What an adapter trains of the base itself (`bias`) is put back, and so are modules trained whole
    (`modules_to_save`), which PEFT's own unloading leaves in their trained state.
    """
    own = {id(parameter) for parameter in base.parameters()}
    model = FastLanguageModel.get_peft_model(base, **adapter)
    trained = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad and id(p) in own]
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
        with torch.no_grad():
            for parameter, value in trained:
                parameter.copy_(value)
                parameter.requires_grad_(False)
