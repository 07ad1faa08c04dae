"""An adapter as a stock PEFT folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pronghorn.errors import SaveFailed
from pronghorn.export.folder import write_folder


def save_adapter(model: Any, tokenizer: Any, path: str | os.PathLike[str]) -> Path:
    """Write the adapter (adapter_config.json, safetensors) and the tokenizer, completely or not at all.

    Returns:
        the folder.

    Raises:
        SaveFailed: for a model without an adapter, a full disk, a folder that cannot be written.
    """
    if not hasattr(model, "peft_config"):
        raise SaveFailed(
            "the model has no adapter to save", fix="save it whole: save_merged, or model.save_pretrained"
        )

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder), safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))

    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return write_folder(path, trained, write)
