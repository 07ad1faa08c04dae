"""Facts of a GGUF file that Transformers' reader passes over: the size of heads, and how RoPE is scaled."""

from __future__ import annotations

import logging
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pronghorn.errors import UnsupportedCheckpoint

logger = logging.getLogger("pronghorn")

#: GGUF's types of values that are numbers -> how `struct` reads them
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY, _F32 = 8, 9, 0
#: what llama.cpp divides frequencies by: Llama 3's scaling; LongRoPE's within and beyond the first context
_FACTORS, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
#: The rest of Llama 3's scaling, alike in all models that have it; the file holds only what comes of it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def completed(config: Any, file: Path) -> Any:
    """A config that Transformers made of a GGUF file, with what the file says besides.

    For some architectures (Qwen3 among them) it leaves the size of a head at its class's default, which is not that of
    every model, and it takes every RoPE for one that is not scaled.

    Raises:
        UnsupportedCheckpoint: the file holds an adapter.
    """
    header = Header(file)
    if header.facts.get("general.type") == "adapter":
        raise UnsupportedCheckpoint(
            "this GGUF file is a LoRA for llama.cpp, not a model",
            where=str(file),
            fix="name the folder of the PEFT adapter that it was made of; llama.cpp takes it with --lora",
        )
    _set_head_size(config, header)
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    # Where layers with a window have a RoPE of their own (Gemma 3), what the file says is of the others.
    scaled: dict[str, Any] = rope.get("full_attention", rope)
    if scaled.get("rope_type", "default") == "default" and "rope_theta" in scaled:
        scaling = _rope_scaling(scaled["rope_theta"], header)
        if scaling:
            whole = {**scaled, **scaling}
            config.rope_parameters = whole if scaled is rope else {**rope, "full_attention": whole}
    return config


def _set_head_size(config: Any, header: Header) -> None:
    from transformers.integrations import GGUF_CONFIG_MAPPING

    size = header.of_model("attention.key_length")
    if not isinstance(size, int) or getattr(config, "head_dim", None) in (None, size):
        return
    known = GGUF_CONFIG_MAPPING.get(header.architecture) or GGUF_CONFIG_MAPPING.get(config.model_type) or {}
    if "attention.key_length" not in known:  # else it has been read, whatever it means there
        config.head_dim = size


def _rope_scaling(theta: float, header: Header) -> dict[str, Any]:
    """`rope_parameters` beside the base frequency; none where RoPE is not scaled."""
    kind, factor = header.of_model("rope.scaling.type"), header.of_model("rope.scaling.factor")
    original = header.of_model("rope.scaling.original_context_length")
    given = header.of_model("rope.scaling.attn_factor")
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor:
        scaling = {"rope_type": "yarn", "factor": factor}
        for name, value in (
            ("original_max_position_embeddings", original),
            ("beta_fast", header.of_model("rope.scaling.yarn_beta_fast")),
            ("beta_slow", header.of_model("rope.scaling.yarn_beta_slow")),
            ("attention_factor", given and given != 1.0 and given * (1.0 + 0.1 * math.log(factor))),
        ):
            scaling |= {name: value} if value else {}
        return scaling
    factors, short, long = (header.tensor(name) for name in (_FACTORS, _SHORT, _LONG))
    if short is not None and long is not None and original:
        scaling = {"rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist()}
        scaling |= {"original_max_position_embeddings": original}
        return scaling | ({"attention_factor": given} if given else {})
    if factors is None or bool((factors == 1).all()):
        return {}
    scaling = {"rope_type": "llama3", "factor": float(factors.max().round()), **_LLAMA3}
    if torch.allclose(_llama3_factors(theta, scaling, len(factors)), factors, rtol=1e-3):
        return scaling
    logger.warning(
        "pronghorn: '%s' has factors of its own for RoPE's frequencies, which are not those of Llama 3: they are not "
        "followed, so that long texts are understood worse than by llama.cpp; load the original checkpoint",
        header.file.name,
    )
    return {}


def _llama3_factors(theta: float, scaling: dict[str, Any], count: int) -> torch.Tensor:
    """What Llama 3's scaling divides each frequency by [count]: 1 for short waves, `factor` for long ones."""
    frequency = theta ** -(torch.arange(count, dtype=torch.float64) / count)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / scaling["factor"] + share)).float()


class Header:
    """The metadata of a GGUF file that are no lists, and where its tensors lie. Empty for a file that is none of the
    versions that are read (2 and 3, little-endian)."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.facts: dict[str, Any] = {}
        self._tensors: dict[str, tuple[int, int, int]] = {}
        with file.open("rb") as stream:
            version, tensors, count = struct.unpack("<4xIQQ", stream.read(24))
            if version not in (2, 3):
                return
            for _ in range(count):
                name = _text(stream)
                value = _value(stream, *_numbers(stream, "I"))
                if value is not None:
                    self.facts[name] = value
            for _ in range(tensors):
                name = _text(stream)
                (dimensions,) = _numbers(stream, "I")
                shape = _numbers(stream, f"{dimensions}Q")
                self._tensors[name] = (math.prod(shape), *_numbers(stream, "IQ"))
            alignment = int(self.facts.get("general.alignment", 32))
            self._data = -(-stream.tell() // alignment) * alignment

    @property
    def architecture(self) -> str:
        return str(self.facts.get("general.architecture", ""))

    def of_model(self, key: str) -> Any:
        """What stands under the architecture's key; None for nothing."""
        return self.facts.get(f"{self.architecture}.{key}")

    def tensor(self, name: str) -> torch.Tensor | None:
        """A vector in fp32; None where there is none of the name, or in another format."""
        count, kind, offset = self._tensors.get(name, (0, -1, 0))
        if kind != _F32:
            return None
        with self.file.open("rb") as stream:
            stream.seek(self._data + offset)
            return torch.tensor(_numbers(stream, f"{count}f"))


def _numbers(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))


def _text(stream: BinaryIO) -> str:
    return stream.read(*_numbers(stream, "Q")).decode("utf-8", "replace")


def _value(stream: BinaryIO, kind: int) -> Any:
    """The value that stands next; None for a list, which is passed over."""
    if kind == _TEXT:
        return _text(stream)
    if kind != _ARRAY:
        return _numbers(stream, _NUMBERS[kind])[0]
    inner, count = _numbers(stream, "IQ")
    if inner in _NUMBERS:
        stream.seek(count * struct.calcsize(f"<{_NUMBERS[inner]}"), 1)
    else:
        for _ in range(count):
            _value(stream, inner)
    return None
