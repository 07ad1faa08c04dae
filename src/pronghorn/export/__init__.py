"""Models out: adapters, stock checkpoints with the adapter merged in, GGUF files, uploads. The names here are imported
when first used: a training that begins needs none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.export.adapter import save_adapter
    from pronghorn.export.checkpoint_gate import check_checkpoint
    from pronghorn.export.gguf import save_gguf, save_gguf_adapter
    from pronghorn.export.hub import push
    from pronghorn.export.merged import check_save_method, save_merged
    from pronghorn.export.quantised import save_quantised
    from pronghorn.export.result import Export
    from pronghorn.export.verify import verify_export

__all__ = [
    "Export",
    "check_checkpoint",
    "check_save_method",
    "push",
    "save_adapter",
    "save_gguf",
    "save_gguf_adapter",
    "save_merged",
    "save_quantised",
    "verify_export",
]

_HOME = {
    "Export": "result",
    "check_checkpoint": "checkpoint_gate",
    "check_save_method": "merged",
    "push": "hub",
    "save_adapter": "adapter",
    "save_gguf": "gguf",
    "save_gguf_adapter": "gguf",
    "save_merged": "merged",
    "save_quantised": "quantised",
    "verify_export": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pronghorn.export' has no attribute '{name}'")
    return getattr(import_module(f"pronghorn.export.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
