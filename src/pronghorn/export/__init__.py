"""Models out: adapters, and stock checkpoints with the adapter merged in."""

from pronghorn.export.adapter import save_adapter
from pronghorn.export.merged import save_merged
from pronghorn.export.verify import verify_export

__all__ = ["save_adapter", "save_merged", "verify_export"]
