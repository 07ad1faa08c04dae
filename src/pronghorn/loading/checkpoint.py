"""Look at a local checkpoint before Transformers does, so that what is wrong with it is named with its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pronghorn.errors import CheckpointCorrupt, UnsupportedCheckpoint
from pronghorn.loading.source import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

#: Transformers' name for weights of e4m3 with a scale a block, as `export --to fp8` writes them
FP8 = "fp8"

_AGAIN = "download or save the model again"
_HEADER_LIMIT = 100_000_000  # bytes; safetensors refuses longer headers, too


def check_folder(folder: Path) -> dict[str, Any]:
    """Check the weights of a model folder and return its config.json.

    Raises:
        CheckpointCorrupt: for an unreadable config.json, a missing or truncated shard, a damaged index.
        UnsupportedCheckpoint: for pickled weights, a shard outside the folder, an unknown quantisation.
    """
    config = read_json(folder / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "bitsandbytes", FP8):
        raise UnsupportedCheckpoint(
            f"the checkpoint is quantised with '{method}', which is not read here",
            where=str(folder / "config.json"),
            fix="load the original 16-bit checkpoint (load_in_4bit=True quantises it), one in fp8 blocks, or a "
            "bitsandbytes one",
        )
    for file in weight_files(folder):
        check_safetensors(file)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, single or sharded. All exist and lie inside the folder."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    pickles = [name for name in PICKLES if (folder / name).is_file()]
    if pickles:
        raise UnsupportedCheckpoint(
            "the weights are pickled, and unpickling runs code from the file",
            where=str(folder / pickles[0]),
            fix="convert where you trust the file: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder) writes safetensors",
        )
    raise CheckpointCorrupt(
        f"the folder has a config.json but no weights (no {SINGLE}, no {INDEX})",
        where=str(folder),
        fix=_AGAIN,
    )


def _shards(folder: Path) -> list[Path]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointCorrupt("the index has no weight_map", where=str(folder / INDEX), fix=_AGAIN)
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise UnsupportedCheckpoint(
                f"the index points outside its folder: '{name}'",
                where=str(folder / INDEX),
                fix="do not use this checkpoint",
            )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointCorrupt(
            f"{len(absent)} of {len(names)} shards are missing, first {absent[0]}",
            where=str(folder),
            fix="download the missing files",
        )
    return [folder / name for name in names]


def check_safetensors(path: Path) -> None:
    """Read a safetensors header and compare the file's length with what it promises. The weights are not read.

    Raises:
        CheckpointCorrupt: for a damaged header or a truncated file.
    """
    header = read_header(path)
    promised = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    size = path.stat().st_size
    with path.open("rb") as file:
        expected = 8 + int.from_bytes(file.read(8), "little") + promised
    if size != expected:
        raise CheckpointCorrupt(
            f"{path.name} is {'truncated' if size < expected else 'too long'}: {size:,} of {expected:,} bytes",
            where=str(path),
            fix=_AGAIN,
        )


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> dtype, shape and data_offsets of the tensors of a safetensors file, which lie one behind the other.

    Raises:
        CheckpointCorrupt: when it is none.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if 0 < length <= _HEADER_LIMIT else b""
    try:
        header = json.loads(raw.decode("utf-8"))
        header.pop("__metadata__", None)
        _check_entries(list(header.values()))
    except (
        UnicodeDecodeError,
        json.JSONDecodeError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as e:
        raise CheckpointCorrupt(
            f"{path.name} is not a complete safetensors file", where=str(path), fix=_AGAIN
        ) from e
    return header


def _check_entries(entries: list[dict[str, Any]]) -> None:
    """What safetensors itself asks of a header; whoever reads by the offsets relies on it.

    Raises:
        KeyError, TypeError, ValueError: where it is otherwise.
    """
    at = 0
    for begin, end in sorted(tuple(entry["data_offsets"]) for entry in entries):
        if type(begin) is not int or type(end) is not int or begin != at or end < begin:
            raise ValueError("tensors overlap, or leave a gap")
        at = end
    for entry in entries:
        if not isinstance(entry["dtype"], str) or not all(type(n) is int and n >= 0 for n in entry["shape"]):
            raise ValueError("a tensor has no dtype or shape")
