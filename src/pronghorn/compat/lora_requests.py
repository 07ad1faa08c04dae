"""Answers through an adapter that lies in a folder, or through none, as vLLM's `lora_request` asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_NAME = "lora_request"


@dataclass(frozen=True)
class LoRARequest:
    """A saved adapter; the first two fields are there for scripts that make one themselves."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@contextmanager
def answering_with(model: Any, request: LoRARequest | None) -> Iterator[None]:
    """Within this context the model runs the request's adapter, or none; afterwards what it ran before.

    An adapter that is the model's own, tensor for tensor, is not loaded again.
    """
    if request is None:
        if hasattr(model, "peft_config"):
            with model.disable_adapter():
                yield
        else:
            yield
        return
    if not hasattr(model, "peft_config"):
        from peft import PeftModel

        wrapped = PeftModel.from_pretrained(model, request.lora_path, adapter_name=_NAME)
        try:
            yield
        finally:
            wrapped.unload()
        return
    if is_own(model, request.lora_path):
        yield
        return
    active, trained = model.active_adapter, {n: p.requires_grad for n, p in model.named_parameters()}
    model.load_adapter(request.lora_path, adapter_name=_NAME)
    try:
        model.set_adapter(_NAME)
        yield
    finally:
        model.set_adapter(active)
        model.delete_adapter(_NAME)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


def is_own(model: Any, folder: str) -> bool:
    """Whether the adapter in a folder is the one that the model runs."""
    from peft import PeftConfig, get_peft_model_state_dict

    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        return False
    mine, theirs = model.peft_config[model.active_adapter], PeftConfig.from_pretrained(folder)
    if any(
        getattr(mine, name, None) != getattr(theirs, name, None) for name in ("r", "lora_alpha", "use_rslora")
    ):
        return False
    here, there = get_peft_model_state_dict(model), load_file(str(file))
    return here.keys() == there.keys() and all(
        torch.equal(there[name], tensor.cpu().to(there[name].dtype)) for name, tensor in here.items()
    )
