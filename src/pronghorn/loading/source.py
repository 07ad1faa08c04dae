"""What a model's name means: a folder, a GGUF file, a PEFT adapter's folder, or a repository on the hub."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pronghorn.errors import CheckpointCorrupt, ModelNotFound, UnsupportedCheckpoint, nearest

Kind = Literal["hub", "folder", "gguf", "adapter"]

ADAPTER_CONFIG = "adapter_config.json"

_HOW_TO_NAME = "give an existing folder, a .gguf file or a hub id"


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        kind: which of the four it is; "gguf" is a file in a local folder.
        location: the folder, or the hub id.
        gguf_file: name of the GGUF file in `location` (a hub repository can have one, too).
        revision: of a hub repository.
    """

    kind: Kind
    location: str
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        return self.kind != "hub"

    @property
    def path(self) -> Path:
        return Path(self.location)

    @property
    def name(self) -> str:
        """What `locate` finds it by again; written into adapters as their base."""
        return str(self.path / self.gguf_file) if self.is_local and self.gguf_file else self.location


def locate(
    model_name: str | os.PathLike[str], *, gguf_file: str | None = None, revision: str | None = None
) -> Source:
    """Find a model by folder, file or hub id. Local paths come first; nothing is downloaded here.

    Raises:
        ModelNotFound: for a path that does not exist; the nearest sibling is suggested.
        UnsupportedCheckpoint: for a file of another kind than GGUF, or a folder with several GGUF files.
    """
    name = os.fspath(model_name)
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        return _from_folder(path.resolve(), gguf_file)
    if _looks_like_a_path(name):
        raise ModelNotFound(
            f"there is no model at '{name}'",
            fix=_nearest_sibling(path) or _HOW_TO_NAME,
        )
    return Source("hub", name, gguf_file, revision)


def base_of_adapter(source: Source) -> Source:
    """The base model that an adapter folder names.

    Raises:
        CheckpointCorrupt: for an unreadable adapter_config.json, or one without a base.
        ModelNotFound: when the base is a path that does not exist.
    """
    config = read_json(source.path / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointCorrupt(
            "the adapter does not name its base model",
            where=str(source.path / ADAPTER_CONFIG),
            fix="add base_model_name_or_path",
        )
    try:
        found = locate(base, revision=config.get("revision"))
    except ModelNotFound as error:
        raise ModelNotFound(
            f"the adapter's base model '{base}' does not exist",
            where=str(source.path / ADAPTER_CONFIG),
            fix="put the base model's present place into base_model_name_or_path",
        ) from error
    if found.kind == "adapter":
        raise CheckpointCorrupt(
            f"the adapter's base '{base}' is an adapter itself",
            where=str(source.path / ADAPTER_CONFIG),
            fix="merge that one first",
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointCorrupt: naming the file and the line.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointCorrupt(
            f"{path.name} cannot be read: {error}", where=str(path), fix="download or save the model again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointCorrupt(
            f"{path.name} holds a {type(value).__name__}, not an object",
            where=str(path),
            fix="download or save the model again",
        )
    return value


def _from_file(path: Path) -> Source:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return Source("gguf", str(path.resolve().parent), path.name)
    if path.suffix == ".gguf":
        raise CheckpointCorrupt(
            "the file does not start as GGUF does", where=str(path), fix="download it again"
        )
    raise UnsupportedCheckpoint(
        "a model is a folder or a .gguf file, this is another file",
        where=str(path),
        fix=f"give the folder: {path.parent}" if (path.parent / "config.json").is_file() else _HOW_TO_NAME,
    )


def _from_folder(path: Path, gguf_file: str | None) -> Source:
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise ModelNotFound(
                f"the folder has no file '{gguf_file}'",
                where=str(path),
                fix=nearest(gguf_file, [p.name for p in path.glob("*.gguf")])
                or "name a file that is in the folder",
            )
        return _from_file(path / gguf_file)
    is_model, is_adapter = (path / "config.json").is_file(), (path / ADAPTER_CONFIG).is_file()
    if is_model and is_adapter and any(path.glob("model*.safetensors")):
        # Transformers would put the adapter on this model, whatever the base it was trained on.
        raise UnsupportedCheckpoint(
            "the folder holds a whole model and an adapter, and which one is meant is unclear",
            where=str(path),
            fix="move adapter_config.json and adapter_model.safetensors into a folder of their own",
        )
    if is_adapter:
        return Source("adapter", str(path))
    if is_model:
        return Source("folder", str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _from_file(files[0])
    if files:
        raise UnsupportedCheckpoint(
            f"the folder has {len(files)} GGUF files: {', '.join(file.name for file in files[:5])}",
            where=str(path),
            fix="name one with gguf_file=...",
        )
    inside = [
        p.name for p in path.iterdir() if (p / "config.json").is_file() or (p / ADAPTER_CONFIG).is_file()
    ]
    raise ModelNotFound(
        "the folder holds no model (no config.json, adapter_config.json or .gguf file)",
        where=str(path),
        fix=f"did you mean '{path / sorted(inside)[0]}'?"
        if inside
        else "give the folder that has config.json",
    )


def _looks_like_a_path(name: str) -> bool:
    """Hub ids are `name` or `owner/name`; anything else that does not exist is a wrong path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(".gguf")


def _nearest_sibling(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = nearest(path.name, siblings)
    return guess.replace("'", f"'{path.parent}/", 1) if guess else ""
