"""Fish-Speech checkpoints in and out, in the layout they are published in; and pickled weights made safetensors."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pronghorn.engine import base_causal_lm, bind
from pronghorn.errors import (
    AttentionUnavailable,
    CheckpointCorrupt,
    ModelNotFound,
    UnsupportedCheckpoint,
    WeightsMismatch,
)
from pronghorn.export.folder import write_beside, write_folder
from pronghorn.export.merge import plan_merge
from pronghorn.export.safetensors_file import Entry, write_safetensors
from pronghorn.hardware import probe
from pronghorn.loading.adapters import load_adapter
from pronghorn.loading.checkpoint import SINGLE, check_safetensors, read_header, weight_files
from pronghorn.loading.hub import download
from pronghorn.loading.precision import choose_bits
from pronghorn.loading.source import Source, base_of_adapter, locate, read_json
from pronghorn.speech.four_bits import to_four_bits
from pronghorn.speech.layout import DualARConfig, config_of, is_dual_ar, not_dual_ar
from pronghorn.speech.model import DualARModel
from pronghorn.speech.names import Part, join, published_parts, split
from pronghorn.speech.tokenizer import SpeechTokenizer, read_tokenizer

logger = logging.getLogger("pronghorn")

PICKLE = "model.pth"
_EMBEDDING = "slow.model.embed_tokens.weight"
#: What belongs to a tokenizer in a published folder.
_TOKENIZER_FILES = ("tokenizer*", "special_tokens*", "added_tokens.json", "vocab.json", "merges.txt")


def load_speech(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    save_levels: str = "all",
    load_in_4bit: bool = False,
) -> tuple[Any, SpeechTokenizer]:
    """A Fish-Speech checkpoint, or an adapter of one, bound to the fast path; in eval mode.

    Args:
        path: a folder, or a repository on the hub.
        dtype: None: as it is stored on a GPU, float32 elsewhere.
        device: None: the GPU where there is one.
        save_levels: what layers keep for backward (`pronghorn.blocks.LEVELS`).
        load_in_4bit: both transformers' projections in NF4, for an adapter.

    Returns:
        a `DualARModel`, for an adapter's folder a PEFT model of one; and the tokenizer.

    Raises:
        ModelNotFound, CheckpointCorrupt, UnsupportedCheckpoint: it is not there, damaged, pickled, or another model.
        WeightsMismatch: config.json and weights disagree.
        AdapterMismatch: the adapter is another model's.
        PackageMissing: 4 bits without bitsandbytes.
    """
    choose_bits(load_in_4bit, False, False, probe())
    source = locate(path)
    folder = _base_folder(source)
    config, tokenizer = _layout_in(folder)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None and chosen.type == "cpu":
        dtype = torch.float32
    config.name_or_path = str(folder)
    model = _with_weights(config, _read_weights(config, folder, dtype))
    if load_in_4bit:
        to_four_bits(model)
    model = model.to(chosen).eval()
    bind(model.slow, save_levels=save_levels)
    binding = bind(model.fast, save_levels=save_levels)
    if chosen.type == "cuda":
        # Frames are documents of a dozen tokens: 7,200 of them take an H200 360 ms a step so, and 569 with cuDNN.
        with suppress(AttentionUnavailable):
            binding.choose_attention("flash")
    return (load_adapter(model, source).eval() if source.kind == "adapter" else model), tokenizer


def read_layout(path: str | os.PathLike[str]) -> tuple[DualARConfig, SpeechTokenizer]:
    """Config and tokenizer of a checkpoint, or of an adapter's base, without the weights.

    Raises:
        ModelNotFound, CheckpointCorrupt, UnsupportedCheckpoint, WeightsMismatch: as `load_speech`.
    """
    return _layout_in(_base_folder(locate(path)))


def is_fish_speech(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint, or an adapter's base, is Fish-Speech's.

    Raises:
        ModelNotFound, CheckpointCorrupt: it is not there, or its config.json cannot be read.
    """
    source = locate(path)
    base = base_of_adapter(source) if source.kind == "adapter" else source
    if base.kind == "hub":
        base = download(base, token=None, trust_remote_code=False)
    return base.kind == "folder" and is_dual_ar(read_json(base.path / "config.json"))


def _layout_in(folder: Path) -> tuple[DualARConfig, SpeechTokenizer]:
    published, where = read_json(folder / "config.json"), str(folder / "config.json")
    if not is_dual_ar(published):
        raise not_dual_ar(published, where)
    tokenizer = read_tokenizer(folder)
    config = config_of(published, tokenizer.semantic, where)
    _check_tokens(config, tokenizer)
    return config, tokenizer


def _base_folder(source: Source) -> Path:
    """The folder of a checkpoint, or of an adapter's base; one of the hub is downloaded."""
    base = base_of_adapter(source) if source.kind == "adapter" else source
    if base.kind == "hub":
        base = download(base, token=None, trust_remote_code=False)
        if base.kind == "folder" and not any(base.path.glob("model*.safetensors")):
            raise UnsupportedCheckpoint(
                f"'{source.location}' has no safetensors",
                fix=f"where it has a {PICKLE}: `hf download {source.location} --local-dir DIR`, then "
                "`pronghorn speech convert DIR`",
            )
    if base.kind != "folder":
        raise ModelNotFound(
            f"'{base.name}' is no folder of a speech model", fix="give the folder with config.json"
        )
    return base.path


def _check_tokens(config: DualARConfig, tokenizer: SpeechTokenizer) -> None:
    first, last = tokenizer.semantic
    if last >= config.slow.vocab_size:
        raise WeightsMismatch(
            f"the tokenizer's semantic tokens go up to {last}, the model has {config.slow.vocab_size} tokens",
            where=str(tokenizer.folder),
            fix="put the tokenizer that belongs to the model beside it",
        )
    if last - first >= config.codebook_size:
        raise WeightsMismatch(
            f"there are {last - first + 1} semantic tokens, and {config.codebook_size} codes",
            where=str(tokenizer.folder),
            fix="put the tokenizer that belongs to the model beside it",
        )


def _read_weights(config: DualARConfig, folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The model's tensors by its own names."""
    wanted = published_parts(config)
    if (folder / PICKLE).is_file() and not any(folder.glob("model*.safetensors*")):
        raise UnsupportedCheckpoint(
            "the weights are pickled",
            where=str(folder / PICKLE),
            fix=f"pronghorn speech convert {folder}: it reads tensors alone and writes {SINGLE}",
        )
    found: dict[str, Tensor] = {}
    others: list[str] = []
    files = weight_files(folder)
    for file in files:
        check_safetensors(file)
    headers = [read_header(file) for file in files]
    _check_names(
        wanted, {name: entry["shape"] for header in headers for name, entry in header.items()}, folder
    )
    for file, header in zip(files, headers, strict=True):
        others += set(header) - set(wanted)
        with safe_open(file, framework="pt") as tensors:
            for name in set(header) & set(wanted):
                found |= split(tensors.get_tensor(name), wanted[name])
    if others:
        logger.warning(
            "pronghorn: %d tensors of the checkpoint belong to none of the two transformers and are left out, first %s",
            len(others),
            sorted(others)[0],
        )
    stored_dtype = found[_EMBEDDING].dtype
    config.stored_dtype, config.dtype = str(stored_dtype).removeprefix("torch."), dtype or stored_dtype
    return {name: tensor.to(config.dtype) for name, tensor in found.items()}


def _check_names(wanted: dict[str, tuple[Part, ...]], stored: dict[str, list[int]], folder: Path) -> None:
    absent = sorted(set(wanted) - set(stored))
    if absent:
        raise WeightsMismatch(
            f"{len(absent)} of {len(wanted)} tensors that config.json asks for are not there, first {absent[0]}",
            where=str(folder),
            fix="take config.json and weights from the same place",
        )
    for name, parts in wanted.items():
        rows = sum(part.rows for part in parts)
        if stored[name][0] != rows:
            raise WeightsMismatch(
                f"{name} has {stored[name][0]} rows, config.json asks for {rows}",
                where=str(folder),
                fix="take config.json and weights from the same place",
            )


def _with_weights(config: DualARConfig, tensors: dict[str, Tensor]) -> DualARModel:
    """A model of these very tensors; nothing is drawn at random first."""
    with torch.device("meta"):
        model = DualARModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes.get(name):
            raise WeightsMismatch(
                f"{name} is {list(tensor.shape)}, config.json asks for {list(shapes.get(name, ()))}",
                where=config.name_or_path or "",
                fix="take config.json and weights from the same place",
            )
    model.load_state_dict(tensors, strict=False, assign=True)
    for decoder in (model.slow, model.fast):
        decoder.tie_weights()
        rotary = decoder.model.rotary_emb
        decoder.model.rotary_emb = type(rotary)(decoder.config)
    unset = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unset:
        raise CheckpointCorrupt(
            f"no weights for {unset[0]}", where=config.name_or_path or "", fix="report this"
        )
    return model


def save_speech(model: Any, tokenizer: SpeechTokenizer, path: str | os.PathLike[str]) -> Path:
    """Write a model, its adapters merged, in the layout it was published in. What no adapter changes stays bit for bit.

    Raises:
        SaveFailed: the disk is full, the folder cannot be written, or an adapter has no merged form.
    """
    base: Any = base_causal_lm(model)
    config: DualARConfig = base.config
    made = {entry.name: entry for entry in plan_merge(model, getattr(torch, config.stored_dtype)).entries}
    entries = [_published(name, parts, made) for name, parts in published_parts(config).items()]

    def write(folder: Path) -> None:
        write_safetensors(folder / SINGLE, entries)
        (folder / "config.json").write_text(json.dumps(config.published, indent=2) + "\n", encoding="utf-8")
        for file in _tokenizer_files(tokenizer):
            shutil.copy2(file, folder / file.name)

    return write_folder(path, sum(entry.nbytes for entry in entries), write)


def _published(name: str, parts: tuple[Part, ...], made: dict[str, Entry]) -> Entry:
    entries = [made[part.name] for part in parts]
    shape = (sum(part.rows for part in parts), *entries[0].shape[1:])

    def make() -> Tensor:
        return join(parts, {entry.name: entry.make() for entry in entries})

    return Entry(name, shape, entries[0].dtype, make)


def _tokenizer_files(tokenizer: SpeechTokenizer) -> Iterable[Path]:
    folder = tokenizer.folder
    found = {p for pattern in _TOKENIZER_FILES for p in folder.glob(pattern)} if folder else set()
    return sorted(path for path in found if path.is_file())


def convert_pickle(path: str | os.PathLike[str]) -> Path:
    """Write a folder's model.pth as model.safetensors beside it. Only tensors are read; no code in the file runs.

    Raises:
        ModelNotFound: the folder has no model.pth.
        UnsupportedCheckpoint: the file holds something other than tensors.
        SaveFailed: the disk is full, or the folder cannot be written.
    """
    folder = Path(path).expanduser()
    file = folder / PICKLE if folder.is_dir() else folder
    if not file.is_file():
        raise ModelNotFound(f"there is no {PICKLE} in '{path}'", fix="give the folder it is in")
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UnsupportedCheckpoint(
            f"{file.name} cannot be read as tensors alone: {str(error).splitlines()[0][:200]}",
            where=str(file),
            fix="get the checkpoint as safetensors from its publisher; do not unpickle it",
        ) from error
    tensors = _tensors_of(state, file)
    entries = [Entry(name, tuple(t.shape), t.dtype, partial(_same, t)) for name, t in tensors.items()]
    write_beside(
        file.parent, sum(e.nbytes for e in entries), lambda to: write_safetensors(to / SINGLE, entries)
    )
    return file.parent / SINGLE


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _tensors_of(state: Any, file: Path) -> dict[str, Tensor]:
    """The state dict in a file of weights: of the model, or of a training run's `state_dict` with "model." in front."""
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()) or not state:
        raise UnsupportedCheckpoint(
            f"{file.name} holds no state dict of tensors", where=str(file), fix="name a model's weights"
        )
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}
