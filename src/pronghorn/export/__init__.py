"""Models out: adapters, stock checkpoints with the adapter merged in, GGUF files, uploads."""

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
