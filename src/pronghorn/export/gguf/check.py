"""The gate for GGUF files: read back, compared with the live model, every adapter's change looked for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pronghorn.engine import base_causal_lm
from pronghorn.errors import PronghornError
from pronghorn.export.gate import Comparison, Predict, Probe, compare, torch_predictor
from pronghorn.export.gguf import llama_cpp
from pronghorn.export.gguf.architecture import Dialect, gguf_entries
from pronghorn.export.gguf.methods import Method
from pronghorn.export.merge import adapted_weights
from pronghorn.export.safetensors_file import Entry
from pronghorn.memory.pool import available_host_bytes

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
#: A change that is in the file is found there with a factor of 1, one that was forgotten with 0.
_FOUND, _SURE = 0.5, 0.15


@dataclass
class Checked:
    """What the gate found about one file."""

    file: str
    comparisons: list[Comparison] = field(default_factory=list)
    adapted: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        found = [str(item) for item in self.comparisons] or ["not compared"]
        if self.adapted:
            found.append(f"{self.adapted} adapted weights looked for")
        return f"{self.file}: {'; '.join([*found, *self.problems])}"


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

    Args:
        entries: what was to be written, by GGUF's names.
        probe: what the live model said.

    A reader that cannot open the file is a problem of the file, like a prediction that is too far off.
    """
    result = Checked(path.name)
    from gguf import GGUFReader

    reader = GGUFReader(path)
    result.problems += _metadata_problems(reader, dialect, entries)
    result.adapted = _look_for_adapters(reader, model, dialect, result.problems)
    tied = "output.weight" not in entries
    if _fits(model):
        _compare(result, method, probe, lambda: _transformers(path, model, tied))
    else:
        logger.warning("pronghorn: %s is not opened with Transformers: the memory is too small", path.name)
    if llama_cpp.available():
        _compare(result, method, probe, lambda: _llama_cpp(path, tokenizer, probe, result.problems))
    return result


def _compare(result: Checked, method: Method, probe: Probe, open_reader: Callable[[], Any]) -> None:
    try:
        with open_reader() as (reader, predict):
            found = compare(reader, predict, probe)
    except (PronghornError, ValueError, KeyError, RuntimeError, OSError) as error:
        result.problems.append(f"cannot be opened: {error}")
        return
    result.comparisons.append(found)
    if not found.divergence <= method.most_divergence:
        result.problems.append(f"{found}; at most {method.most_divergence} nats expected")
    elif found.lost > method.most_lost:
        result.problems.append(f"{found}; at most {method.most_lost:.0%} clear preferences lost expected")


def _fits(model: Any) -> bool:
    """Whether a second copy of the model fits into the host's memory."""
    base = base_causal_lm(model)
    size = sum(p.numel() for p in base.parameters()) * (2 if base.dtype.itemsize == 2 else 4)
    return available_host_bytes() > 1.5 * size + (1 << 28)


@contextmanager
def _transformers(path: Path, model: Any, tied: bool) -> Iterator[tuple[str, Predict]]:
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
    device = model.get_input_embeddings().weight.device
    size = sum(p.numel() * p.element_size() for p in reopened.parameters())
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 1.2 * size + (1 << 30):
        reopened.to(device)
    yield "transformers", torch_predictor(reopened.eval())


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
        field = reader.fields.get(f"{dialect.architecture}.{key}")
        here, there = getattr(dialect.config, name, None), field and int(field.contents())
        if here is not None and here != there:
            problems.append(f"{dialect.architecture}.{key} is {there}, not {here}")
    return problems


def _look_for_adapters(reader: Any, model: Any, dialect: Dialect, problems: list[str]) -> int:
    """Look for what the adapters changed in every weight of the file; returns how many there are.

        c = <F − W, Δ> / <Δ, Δ>,   Δ = W' − W

    F the file's weight, W the base's, W' the merged one. Rounding errors are hardly correlated with Δ, so c is 1 up to
    ‖F − W'‖ / (‖Δ‖ √n), and 0 where the adapter is not in the file: forgotten, or swallowed by the format, as when W
    lies on the format's own steps already (a base that was quantised) and Δ is smaller than half a step. Where that
    uncertainty is too large, as for an adapter that was hardly trained, nothing is concluded.
    """
    from gguf import dequantize

    found = {tensor.name: tensor for tensor in reader.tensors}
    count, unchanged, lost = 0, [], []
    for name, make_base, make_merged in adapted_weights(model):
        base = make_base()
        both = [Entry(name, tuple(base.shape), torch.float32, make) for make in (lambda: base, make_merged)]  # noqa: B023
        below, above = (gguf_entries(dialect, [entry])[-1] for entry in both)
        if above.name not in found:
            continue  # named among the metadata's problems
        count += 1
        base, merged = below.make(), above.make()
        change = merged - base
        size = _sum(change * change)
        if size == 0.0:
            unchanged.append(name)
            continue
        written = torch.from_numpy(dequantize(found[above.name].data, found[above.name].tensor_type).copy())
        written = written.view(merged.shape).to(merged.device)
        factor = _sum((written - base) * change) / size
        unsure = (_sum((written - merged) ** 2) / (size * change.numel())) ** 0.5
        if factor < _FOUND and unsure < _SURE:
            lost.append(f"{name}: {factor:.2f} of its adapter's change is left")
    if lost:
        problems.append(f"{len(lost)} of {count} adapted weights lost their adapter, first {lost[0]}")
    if unchanged:
        logger.warning(
            "pronghorn: %d of %d adapters change nothing (B is zero), first %s",
            len(unchanged),
            count,
            unchanged[0],
        )
    return count


def _sum(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=torch.float64))
