"""Models out: adapters, stock checkpoints with the adapter merged in, GGUF files, uploads. The names here are imported
when first used: a training that begins needs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pronghorn.importing import names_at_first_use

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
    "Export": "pronghorn.export.result",
    "check_checkpoint": "pronghorn.export.checkpoint_gate",
    "check_save_method": "pronghorn.export.merged",
    "push": "pronghorn.export.hub",
    "save_adapter": "pronghorn.export.adapter",
    "save_gguf": "pronghorn.export.gguf",
    "save_gguf_adapter": "pronghorn.export.gguf",
    "save_merged": "pronghorn.export.merged",
    "save_quantised": "pronghorn.export.quantised",
    "verify_export": "pronghorn.export.verify",
}


__getattr__ = names_at_first_use(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
