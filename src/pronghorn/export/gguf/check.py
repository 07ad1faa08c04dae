"""The gate for GGUF files: read back, compared with the live model, every adapter's change looked for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pronghorn.engine import base_causal_lm
from pronghorn.errors import PronghornError
from pronghorn.export.adapter_probe import look_for_changes
from pronghorn.export.gate import Checked, Limits, Predict, Probe, compare, place_for_second, torch_predictor
from pronghorn.export.gguf import llama_cpp
from pronghorn.export.gguf.architecture import Dialect
from pronghorn.export.gguf.latent import is_latent
from pronghorn.export.gguf.methods import Method
from pronghorn.export.merge import adapted_weights
from pronghorn.export.safetensors_file import Entry

logger = logging.getLogger("pronghorn")

#: The model's sizes, by llama.cpp's names of them.
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


def check_gguf(
    path: Path,
    method: Method,
    model: Any,
    tokenizer: Any,
    dialect: Dialect,
    entries: dict[str, Entry],
    probe: Probe,
) -> Checked:
    """Open a file with Transformers, and with llama.cpp where installed, and compare each with the live model.

    Where Transformers does not read the family from GGUF, the file's tensors are put into its model class instead.

    Args:
        entries: what was to be written, by GGUF's names.
        probe: what the live model said.

    A reader that cannot open the file is a problem of the file, like a prediction that is too far off.
    """
    result = Checked(path.name)
    from gguf import GGUFReader

    reader = GGUFReader(path)
    result.problems += _metadata_problems(reader, dialect, entries)
    result.adapted, lost = look_for_changes(_changed(reader, model, dialect, result.problems))
    result.problems += lost
    limits = method.limits.against(model)
    if (device := place_for_second(model, base_causal_lm(model).dtype.itemsize)) is None:
        logger.warning("pronghorn: %s is not opened with Transformers: the memory is too small", path.name)
    elif dialect.family.in_transformers:
        tied = "output.weight" not in entries
        _compare(result, limits, probe, lambda: _transformers(path, model, tied, device))
    else:
        _compare(result, limits, probe, lambda: _tensors(reader, model, dialect, device))
    if llama_cpp.available():
        _compare(result, limits, probe, lambda: _llama_cpp(path, tokenizer, probe, result.problems))
    elif not dialect.family.in_transformers:
        logger.warning(
            "pronghorn: neither llama.cpp nor a reader of Transformers opens %s here: its tensors are compared, its "
            "metadata is not computed with (%s)",
            path.name,
            llama_cpp.INSTALL,
        )
    return result


def _compare(result: Checked, limits: Limits, probe: Probe, open_reader: Callable[[], Any]) -> None:
    try:
        with open_reader() as (reader, predict):
            found = compare(reader, predict, probe)
    except torch.OutOfMemoryError:
        logger.warning("pronghorn: %s is not compared with the model: the memory is too small", result.name)
        return
    except (PronghornError, ValueError, KeyError, RuntimeError, OSError) as error:
        result.problems.append(f"cannot be opened: {error}")
        return
    result.judge(found, limits)


@contextmanager
def _transformers(path: Path, model: Any, tied: bool, device: torch.device) -> Iterator[tuple[str, Predict]]:
    """The file through stock Transformers, in the live model's dtype and on its device where that has room.

    Its GGUF reader knows neither RoPE scaling nor biases of Llama; those of the live config are used here (the file's
    own are compared as metadata, and computed with by llama.cpp).
    """
    from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig

    base = base_causal_lm(model)
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    if config.model_type == "mistral":  # which GGUF does not know: it is written, and read, as Llama
        config = LlamaConfig(
            **{name: value for name, value in config.to_dict().items() if name != "model_type"}
        )
    config.tie_word_embeddings = tied
    reopened, info = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=base.config.dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise RuntimeError(f"Transformers misses {len(missing)} tensors, first {missing[0]}")
    yield "transformers", torch_predictor(reopened.to(device).eval())


@contextmanager
def _tensors(
    reader: Any, model: Any, dialect: Dialect, device: torch.device
) -> Iterator[tuple[str, Predict]]:
    """The file's tensors, put back into a stock model of the live model's config."""
    from gguf import dequantize

    base = base_causal_lm(model)
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    found = {tensor.name: tensor for tensor in reader.tensors}
    config.tie_word_embeddings = "output.weight" not in found
    stock = type(base)(config).to(base.config.dtype)
    # What chooses experts is a buffer; a vision tower, which texts do not pass, stays as it was made.
    held = {**dict(stock.named_parameters()), **dict(stock.named_buffers())}
    for name, tensor in held.items():
        if not dialect.is_written(name) or not (places := dialect.places(name)):
            continue
        parts = [found[place] for place in places]
        written = [
            torch.from_numpy(dequantize(part.data, part.tensor_type).copy()).view(
                *(int(size) for size in reversed(part.shape))
            )
            for part in parts
        ]
        tensor.data = dialect.restored(name, written).to(tensor.dtype)
    yield "the file's tensors", torch_predictor(stock.to(device).eval())


@contextmanager
def _llama_cpp(
    path: Path, tokenizer: Any, probe: Probe, problems: list[str]
) -> Iterator[tuple[str, Predict]]:
    longest = max(len(row) for row in probe.rows) + len(probe.continuation)
    with llama_cpp.LlamaCpp(path, context=max(512, longest)) as opened:
        for row in probe.rows:
            text = tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            expected, found = list(tokenizer(text)["input_ids"]), opened.tokens(text)
            if expected != found:
                problems.append(
                    f"llama.cpp tokenises {text[:40]!r} otherwise: {found[:8]}, not {expected[:8]}"
                )
                break
        yield "llama.cpp", opened.logits


def _metadata_problems(reader: Any, dialect: Dialect, entries: dict[str, Entry]) -> list[str]:
    found = {tensor.name: tensor for tensor in reader.tensors}
    problems = [f"the tensor {name} is missing" for name in sorted(entries.keys() - found.keys())]
    problems += [f"the tensor {name} is not the model's" for name in sorted(found.keys() - entries.keys())]
    for name in sorted(entries.keys() & found.keys()):
        shape = tuple(int(size) for size in reversed(found[name].shape))
        if shape != entries[name].shape:
            problems.append(f"{name} is {list(shape)}, not {list(entries[name].shape)}")
    for key, name in _SIZES.items():
        if key == "attention.head_count_kv" and is_latent(dialect.config):
            continue
        field = reader.fields.get(f"{dialect.architecture}.{key}")
        here, there = getattr(dialect.config, name, None), field and int(field.contents())
        if here is not None and here != there:
            problems.append(f"{dialect.architecture}.{key} is {there}, not {here}")
    return problems


def _changed(
    reader: Any, model: Any, dialect: Dialect, problems: list[str]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, W, W', the file's weight) of every weight that an adapter changes, in the file's order of rows."""
    from gguf import dequantize

    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, make_base, make_merged in adapted_weights(model):
        if not dialect.is_written(name):
            continue
        base = make_base()
        both = [Entry(name, tuple(base.shape), torch.float32, make) for make in (lambda: base, make_merged)]  # noqa: B023
        for below, above in zip(*(dialect.entries(entry) for entry in both), strict=True):
            if above.name not in found:
                problems.append(f"{above.name}, which an adapter changes, is missing")
                continue
            merged = above.make()
            tensor = found[above.name]
            written = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            yield name, below.make(), merged, written.view(merged.shape)
