"""Facts of a GGUF file's header that Transformers' reader passes over."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

#: GGUF's types of values that are numbers -> how `struct` reads them
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


def with_head_size(config: Any, file: Path) -> Any:
    """A config that Transformers made of a GGUF file, with the size of a head that the file says.

    For some architectures (Qwen3 among them) Transformers leaves it at its class's default, which is not that of every
    model.
    """
    from transformers.integrations import GGUF_CONFIG_MAPPING

    facts = numbers_of(file, "attention.key_length")
    if facts is None or getattr(config, "head_dim", None) in (None, facts[1]):
        return config
    architecture, size = facts
    known = GGUF_CONFIG_MAPPING.get(architecture) or GGUF_CONFIG_MAPPING.get(config.model_type) or {}
    if "attention.key_length" not in known:  # else it has been read, whatever it means there
        config.head_dim = size
    return config


def numbers_of(file: Path, key: str) -> tuple[str, int] | None:
    """(architecture, a whole number under one of its keys) of a GGUF file; None where it has none, or is none of the
    versions that are read (2 and 3, little-endian)."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            return None
        version, _, count = struct.unpack("<IQQ", stream.read(20))
        if version not in (2, 3):
            return None
        found: dict[str, Any] = {}
        for _ in range(count):
            name = _text(stream)
            wanted = name == "general.architecture" or name.endswith(f".{key}")
            (kind,) = struct.unpack("<I", stream.read(4))
            value = _value(stream, kind, wanted)
            if wanted:
                found[name] = value
    architecture = found.get("general.architecture")
    value = found.get(f"{architecture}.{key}")
    return (architecture, value) if isinstance(architecture, str) and isinstance(value, int) else None


def _text(stream: BinaryIO) -> str:
    (size,) = struct.unpack("<Q", stream.read(8))
    return stream.read(size).decode("utf-8", "replace")


def _value(stream: BinaryIO, kind: int, wanted: bool) -> Any:
    """The value that stands next; what is not wanted is passed over."""
    if kind == _TEXT:
        return _text(stream)
    if kind != _ARRAY:
        form = f"<{_NUMBERS[kind]}"
        return struct.unpack(form, stream.read(struct.calcsize(form)))[0]
    inner, count = struct.unpack("<IQ", stream.read(12))
    if inner in _NUMBERS and not wanted:
        stream.seek(count * struct.calcsize(f"<{_NUMBERS[inner]}"), 1)
        return None
    return [_value(stream, inner, wanted) for _ in range(count)]
