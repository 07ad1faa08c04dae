"""PEFT's LoRA layer around an fp8 or int8 module: the same in everything but merging."""

from __future__ import annotations

from peft.tuners.lora.layer import Linear
from torch import nn

from pronghorn.weights import StoredLinear


class StoredLoraLinear(Linear):
    """A merged weight has no place among codes, so the base layer is dequantised to 16 bits before."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base: nn.Module = self.get_base_layer()
        if isinstance(base, StoredLinear):
            self.base_layer = base.to_linear()
        super().merge(safe_merge, adapter_names)
