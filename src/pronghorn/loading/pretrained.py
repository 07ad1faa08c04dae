"""Transformers' `from_pretrained`, given the weights by `WeightReader` where that is faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pronghorn.loading.checkpoint import read_header, weight_files
from pronghorn.loading.reading import DTYPES, WeightReader
from pronghorn.loading.source import Source

#: bytes of weights below which Transformers reads them as fast
WORTH_IT = 256 << 20


def from_pretrained(
    auto: Any, source: Source, *, config: Any, dtype: torch.dtype, device_map: Any, **arguments: Any
) -> tuple[Any, dict[str, Any]]:
    """(model, what Transformers says about loading it) of a local source.

    For one GPU, the weights of plain safetensors files come by `WeightReader`: Transformers takes what it is given in a
    checkpoint's place, and converts, quantises and checks it as ever. Everything else it reads itself.

    Args:
        auto: an automatic class of Transformers.
        arguments: further ones of its `from_pretrained`.
    """
    arguments |= {"config": config, "dtype": dtype, "device_map": device_map, "output_loading_info": True}
    device, files = one_gpu(device_map), _plain_files(source, config, dtype)
    generation = _generation_config(source.path) if files else None
    kind = _model_class(auto, config)
    if device is None or generation is None or kind is None or arguments.get("trust_remote_code"):
        return auto.from_pretrained(source.location, **arguments)  # type: ignore[no-any-return]
    with WeightReader(device) as reader:
        model, info = kind.from_pretrained(None, state_dict=reader.open(files), **arguments)
    # What comes of a folder's name otherwise.
    if model.can_generate():
        model.generation_config = generation
    model.name_or_path = model.config.name_or_path = source.location
    return model, info


def one_gpu(device_map: Any) -> torch.device | None:
    """The GPU that all of a model goes to; None where it goes elsewhere or is spread."""
    if not isinstance(device_map, dict) or device_map.keys() != {""}:
        return None
    place = device_map[""]
    device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return device if device.type == "cuda" and device.index is not None else None


def _model_class(auto: Any, config: Any) -> Any:
    """The class of the model, where a config has one: automatic classes take no weights in place of a folder."""
    kind = auto._model_mapping.get(type(config), None)
    return kind if isinstance(kind, type) and getattr(kind, "config_class", None) is type(config) else None


def _plain_files(source: Source, config: Any, dtype: torch.dtype) -> list[Path]:
    """The files of a folder that holds enough weights, unquantised, in the dtype that is asked for; else none."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    special = getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", ())
    stored = getattr(config, "quantization_config", None)
    if source.gguf_file is not None or special or stored is not None or is_deepspeed_zero3_enabled():
        return []
    files = weight_files(source.path)
    if sum(file.stat().st_size for file in files) < WORTH_IT:
        return []
    kinds = {DTYPES.get(entry["dtype"]) for file in files for entry in read_header(file).values()}
    known = all(kind is not None and (kind is dtype or not kind.is_floating_point) for kind in kinds)
    return files if known else []


def _generation_config(folder: Path) -> Any:
    """What Transformers reads beside the weights; None where it would have to make it of config.json."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None
