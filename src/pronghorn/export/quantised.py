"""A model that is held in bitsandbytes' 4 bits as a stock checkpoint, with what is known about how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pronghorn.export.adapter import not_a_source
from pronghorn.export.checkpoint_gate import check_checkpoint
from pronghorn.export.folder import write_folder
from pronghorn.export.merged import parse_size
from pronghorn.export.result import FOLDER_MARK, Export, mark_failed, settle

#: beside the weights: how they were made, and of which checkpoint
REPORT_FILE = "quantisation.json"


def save_quantised(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike[str],
    report: Mapping[str, Any],
    *,
    max_shard_size: int | str = "5GB",
    verify: bool = True,
    held_out: Sequence[str] | None = None,
) -> Export:
    """Write a quantised model without adapters as `AutoModelForCausalLM.from_pretrained` reads it: codes and scales as
    they are in memory, and in config.json the modules that are in 16 bits.

    Args:
        report: written beside the weights as quantisation.json.
        verify: load it again with stock Transformers and compare what it predicts; takes room for a second model.
        held_out: texts to compare on; some short ones when None.

    Raises:
        SaveFailed: for a full disk or a folder that cannot be written.
        ExportDiffers: when it predicts otherwise than the model; the folder is kept, export.failed.txt in it says so.
    """
    shard_bytes = parse_size(max_shard_size)
    target = not_a_source(model, path)
    export = Export(target, [target])

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder), max_shard_size=shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if verify:
            found = check_checkpoint(model, tokenizer, folder, "quantised", held_out)
            found.name = target.name
            export.checks.append(found)
            mark_failed(folder / FOLDER_MARK, found)

    write_folder(target, sum(tensor.nbytes for tensor in model.state_dict().values()), write)
    return settle(export, "report this with the output of pronghorn doctor")
