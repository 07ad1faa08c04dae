"""`save_gguf`: a model with its adapters merged in, as one or several GGUF files, checked before they are in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch

from pronghorn.engine import base_causal_lm
from pronghorn.errors import NotExportable, PackageMissing
from pronghorn.export.folder import folder_of, write_beside
from pronghorn.export.gate import make_probe, torch_predictor
from pronghorn.export.gguf import llama_cpp
from pronghorn.export.gguf.architecture import Dialect, add_architecture, dialect_of, gguf_entries
from pronghorn.export.gguf.check import check_gguf
from pronghorn.export.gguf.file import write_gguf
from pronghorn.export.gguf.methods import Method, resolve
from pronghorn.export.gguf.modelfile import modelfile
from pronghorn.export.gguf.vocabulary import add_vocabulary, read_vocabulary
from pronghorn.export.merge import plan_merge
from pronghorn.export.result import FAILED, Export, mark_failed, settle
from pronghorn.export.safetensors_file import Entry


@dataclass
class _Work:
    """One export on its way."""

    model: Any
    tokenizer: Any
    dialect: Dialect
    entries: list[Entry]
    name: str
    describe: Callable[[Any, Method], None]


def save_gguf(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike[str],
    quantization_method: str | Sequence[str] = "q8_0",
    *,
    verify: bool = True,
    held_out: Sequence[str] | None = None,
) -> Export:
    """Write GGUF files for llama.cpp and Ollama into a folder, each completely or not at all.

    Adapters are added to each weight in fp32, and the sum is quantised; memory holds one weight at a time beside the
    model, which stays unmerged and trainable. Every file is opened again (with Transformers, and with llama.cpp where
    llama-cpp-py-sync is installed) and compared with the live model before it gets its name.

    Args:
        path: the folder; files are called FOLDER.Q8_0.gguf. What else is in it stays.
        quantization_method: a format or several: "f32", "f16", "bf16", "q8_0", "q4_0" and others are written here,
            "q4_k_m" and others by llama.cpp's quantiser; Unsloth's "not_quantized", "fast_quantized" (q8_0) and
            "quantized" (q4_k_m) are understood.
        held_out: texts to compare on, best from held-out rows; some short ones when None.
        verify: False leaves the comparison out.

    Raises:
        UnknownArgument: for a format that does not exist.
        PackageMissing: without the package gguf, or llama-cpp-py-sync where a format needs it.
        NotExportable: for a family, RoPE or vocabulary that llama.cpp does not compute so.
        SaveFailed: for a full disk, or a folder that cannot be written.
        ExportDiffers: when a file predicts otherwise than the model. The file is kept, with another beside it that
            says so (NAME.gguf.failed.txt).
    """
    work, methods = _prepare(model, tokenizer, path, quantization_method)
    probe = make_probe(torch_predictor(model), tokenizer, held_out) if verify else None
    export = Export(folder_of(path))
    named = {entry.name: entry for entry in work.entries}

    def write(folder: Path) -> None:
        _write_all(work, methods, folder)
        for method in methods:
            file = folder / _file_name(work.name, method)
            export.files.append(export.folder / file.name)
            if probe is None:
                continue
            found = check_gguf(file, method, model, tokenizer, work.dialect, named, probe)
            export.checks.append(found)
            mark_failed(_mark(file), found)

    write_beside(path, _needed(work, methods), write)
    for file in export.files:  # an earlier export's marks
        if file.name not in {found.name for found in export.failed}:
            _mark(file).unlink(missing_ok=True)
    return settle(export, "use a format with more bits, such as q8_0")


def _mark(file: Path) -> Path:
    return file.with_name(f"{file.name}{FAILED}")


def _prepare(
    model: Any, tokenizer: Any, path: str | os.PathLike[str], quantization_method: str | Sequence[str]
) -> tuple[_Work, list[Method]]:
    """All that can be refused before anything is computed or written."""
    base = base_causal_lm(model)
    dtype = base.config.dtype if isinstance(base.config.dtype, torch.dtype) else base.dtype
    methods = resolve(quantization_method, dtype)
    if find_spec("gguf") is None:
        raise PackageMissing(
            "the package gguf, which writes GGUF files, is not installed", fix="pip install gguf"
        )
    llama_cpp.require(methods)
    if tokenizer is None:
        raise NotExportable("a GGUF file holds the tokenizer, and none was given", fix="pass the tokenizer")
    dialect = dialect_of(base.config)
    entries = gguf_entries(dialect, plan_merge(model, torch.float32).entries)
    rows = next(entry.shape[0] for entry in entries if entry.name == "token_embd.weight")
    vocabulary = read_vocabulary(tokenizer, rows)
    stop = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    stop_ids = stop if isinstance(stop, list) else [stop] if stop is not None else []
    name = folder_of(path).name or "model"

    def describe(writer: Any, method: Method) -> None:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(method.file_type)
        writer.add_quantization_version(2)
        add_architecture(writer, dialect, rows)
        add_vocabulary(writer, vocabulary, tokenizer, stop_ids)

    return _Work(model, tokenizer, dialect, entries, name, describe), methods


def _write_all(work: _Work, methods: Sequence[Method], folder: Path) -> None:
    for method in methods:
        if method.native:
            _write_native(work, method, folder / _file_name(work.name, method))
    by_llama_cpp = [method for method in methods if not method.native]
    if by_llama_cpp:
        # llama.cpp's quantiser reads a file: one that is asked for anyway, or one that goes again.
        exact = _first_conversion(work.model, methods)
        source = folder / _file_name(work.name, exact)
        if exact not in methods:
            _write_native(work, exact, source)
        for method in by_llama_cpp:
            llama_cpp.quantise(source, folder / _file_name(work.name, method), method)
        if exact not in methods:
            source.unlink()
    text = modelfile(work.tokenizer, _file_name(work.name, methods[0]))
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def _write_native(work: _Work, method: Method, path: Path) -> None:
    write_gguf(
        path, work.dialect.architecture, lambda writer: work.describe(writer, method), work.entries, method
    )


def _first_conversion(model: Any, methods: Sequence[Method]) -> Method:
    """What K-quants are made of: fp32 where it is asked for or the model computes in it, else 16 bits."""
    asked = [method for method in methods if method.name in ("f32", "bf16", "f16")]
    return asked[0] if asked else resolve("not_quantized", base_causal_lm(model).config.dtype)[0]


def _file_name(name: str, method: Method) -> str:
    return f"{name}.{method.file_part}.gguf"


def _needed(work: _Work, methods: Sequence[Method]) -> int:
    elements = sum(prod(entry.shape) for entry in work.entries)
    all_methods = list(methods)
    if any(not method.native for method in methods):
        exact = _first_conversion(work.model, methods)
        all_methods += [] if exact in methods else [exact]
    vocabulary = 64 * next(e.shape[0] for e in work.entries if e.name == "token_embd.weight")
    return sum(method.bytes_of(elements) + vocabulary for method in all_methods)
