"""Embedding models out: the merged checkpoint or the adapter, with the files of sentence-transformers' layout."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from torch.nn.functional import cosine_similarity

from pronghorn.embedding.layout import Layout, write_layout
from pronghorn.embedding.tokens import tokenize
from pronghorn.embedding.vectors import Batcher, encode_tokens, width_of
from pronghorn.engine import base_causal_lm
from pronghorn.errors import PronghornError
from pronghorn.export.adapter import not_a_source, save_adapter
from pronghorn.export.adapter_probe import look_for_changes
from pronghorn.export.checkpoint_gate import changed_weights
from pronghorn.export.folder import write_beside, write_folder
from pronghorn.export.gate import PROBE_TEXTS, Checked, place_for_second
from pronghorn.export.merge import plan_merge
from pronghorn.export.merged import parse_size, write_checkpoint
from pronghorn.export.result import FOLDER_MARK, Export, mark_failed, settle
from pronghorn.hardware import probe
from pronghorn.loading.model import Options, load_config, load_model
from pronghorn.loading.source import locate

logger = logging.getLogger("pronghorn")

#: Least cosine between the live model's vector of a text and the export's. Merging rounds a 16-bit weight once more, by
#: at most 2⁻⁹ of its size; a cosine of 0.99 is a difference of 14 % of the vector, which only a fault leaves.
LEAST_COSINE = 0.99
_SHARD = "5GB"
_PROBE_TOKENS = 96


def save_merged_folder(
    model: Any, tokenizer: Any, layout: Layout, path: str | os.PathLike[str], *, verify: bool = True
) -> Path:
    """Write a folder that sentence-transformers and stock Transformers load without PEFT, completely or not at all.

    Args:
        verify: load it again with stock Transformers, compare vectors of some texts and look for every adapter.

    Raises:
        SaveFailed: for a full disk, a folder that cannot be written, an adapter without a merged form.
        ExportDiffers: when it gives other vectors than the model; the folder is kept and marked.
    """
    plan, target = plan_merge(model), not_a_source(model, path)
    export = Export(target, [target])

    def write(folder: Path) -> None:
        write_checkpoint(model, plan, folder, parse_size(_SHARD))
        tokenizer.save_pretrained(str(folder))
        write_layout(folder, layout, width_of(model))
        if verify:
            found = _check(model, tokenizer, layout, folder)
            found.name = target.name
            export.checks.append(found)
            mark_failed(folder / FOLDER_MARK, found)

    write_folder(target, plan.nbytes, write)
    return settle(export, "save the adapter (save_embedding_adapter)").folder


def save_adapter_folder(model: Any, tokenizer: Any, layout: Layout, path: str | os.PathLike[str]) -> Path:
    """Write the adapter, the tokenizer and the layout's files; see `pronghorn.export.save_adapter`."""
    width = width_of(model)
    return save_adapter(model, tokenizer, path, beside=lambda at: write_layout(at, layout, width)).folder


def write_vectors(path: Path, vectors: np.ndarray) -> None:
    """[n, H] as .npy or, under the name `vectors`, as .safetensors; completely or not at all."""

    def write(folder: Path) -> None:
        if path.suffix == ".safetensors":
            save_file({"vectors": np.ascontiguousarray(vectors)}, folder / path.name)
        else:
            np.save(folder / path.name, vectors)

    write_beside(path.parent, vectors.nbytes, write)


def _check(model: Any, tokenizer: Any, layout: Layout, folder: Path) -> Checked:
    """Load a folder with stock Transformers, compare its vectors with the model's, and look for every adapter."""
    checked = Checked(folder.name)
    base = base_causal_lm(model)
    device = place_for_second(model, 4.0 if base.dtype.itemsize == 4 else 2.0)
    if device is None:
        logger.warning("pronghorn: %s is not compared with the model: the memory is too small", folder.name)
        return checked
    source = locate(folder)
    options = Options(base.config.dtype, 16, "as it was written", device_map={"": device}, headless=True)
    try:
        again = load_model(source, load_config(source, False), options, probe())
    except PronghornError as error:
        checked.problems.append(f"cannot be opened: {error}")
        return checked
    limit = min(layout.max_seq_length or _PROBE_TOKENS, _PROBE_TOKENS)
    texts = tokenize(tokenizer, PROBE_TEXTS, limit)
    assert layout.pooling is not None
    found, expected = (
        encode_tokens(m, texts, Batcher(m, tokenizer.pad_token_id), layout.pooling, _PROBE_TOKENS)
        .float()
        .cpu()
        for m in (again, model)
    )
    least = float(cosine_similarity(found, expected).min())
    if not least >= LEAST_COSINE:
        checked.problems.append(f"a vector has a cosine of {least:.4f} with the model's")
    checked.adapted, lost = look_for_changes(changed_weights(model, again))
    checked.problems += lost
    return checked
