"""llama.cpp itself, where the prebuilt binding llama-cpp-py-sync is installed: its quantiser and its predictions."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pronghorn.errors import ExportMismatch, PackageMissing, SaveFailed
from pronghorn.export.gguf.methods import NATIVE, Method

logger = logging.getLogger("pronghorn")

BINDING = "llama_cpp_py_sync"
INSTALL = "pip install llama-cpp-py-sync"


@cache
def unavailable() -> str | None:
    """Why llama.cpp cannot be used here; None where it can."""
    if find_spec(BINDING) is None or find_spec("cffi") is None:
        return "the package llama-cpp-py-sync is not installed"
    try:
        _library()
    except (RuntimeError, OSError, ImportError) as error:
        glibc = re.search(r"GLIBC\w*\.\d+", str(error))
        why = f"it needs {glibc.group(0)}" if glibc else " ".join(str(error).split())[:200]
        reason = f"the installed llama-cpp-py-sync does not load here: {why}"
        logger.warning("pronghorn: %s; GGUF files are checked with Transformers alone", reason)
        return reason
    return None


def available() -> bool:
    return unavailable() is None


def require(methods: Sequence[Method]) -> None:
    """Raises:
    PackageMissing: for formats that only llama.cpp writes, where the binding is not installed.
    """
    needing = [method.name for method in methods if not method.native]
    if needing and not available():
        raise PackageMissing(
            f"{', '.join(needing)}: written by llama.cpp's quantiser, and {unavailable()}",
            fix=f"{INSTALL} (an older version where the C library is old), or use one of {', '.join(NATIVE)}",
        )


@cache
def _library() -> tuple[Any, Any, list[str], Any]:
    """(ffi, library, its last warnings, the callback that keeps them): llama.cpp prints pages otherwise."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, library = get_ffi(), get_lib()
    said: list[str] = []

    def listen(level: int, text: Any, _: Any) -> None:
        if level >= 3:  # warnings and errors
            said.append(ffi.string(text).decode("utf-8", "replace").strip())
            del said[:-8]

    callback = ffi.callback("ggml_log_callback", listen)
    library.llama_log_set(callback, ffi.NULL)
    library.llama_backend_init()
    return ffi, library, said, callback


def quantise(source: Path, target: Path, method: Method) -> None:
    """Quantise a 16- or 32-bit GGUF file with llama.cpp.

    Raises:
        SaveFailed: when llama.cpp does not do it.
    """
    _, library, said, _ = _library()
    params = library.llama_model_quantize_default_params()
    params.ftype = method.file_type
    params.nthread = torch.get_num_threads()
    ffi = _library()[0]
    status = library.llama_model_quantize(
        str(source).encode(), str(target).encode(), ffi.new("llama_model_quantize_params *", params)
    )
    if status != 0 or not target.is_file():
        raise SaveFailed(
            f"llama.cpp could not quantise to {method.name}: {' '.join(said[-2:]) or f'status {status}'}",
            where=str(target),
            fix="use q8_0, which is written without it",
        )


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU; a context manager.

    Args:
        adapter: a GGUF LoRA file to add.

    Raises:
        ExportMismatch: when llama.cpp does not load it.
    """

    def __init__(self, path: Path, context: int = 512, adapter: Path | None = None) -> None:
        self.ffi, self.library, said, _ = _library()
        self.model = self.handle = None
        self.context = context
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = 0
        said.clear()
        model = self.library.llama_model_load_from_file(str(path).encode(), params)
        if model == self.ffi.NULL:
            raise self._refused(path, said)
        self.model = model
        settings = self.library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        handle = self.library.llama_init_from_model(model, settings)
        if handle == self.ffi.NULL:
            self.close()
            raise self._refused(path, said)
        self.handle = handle
        self.vocabulary = self.library.llama_model_get_vocab(model)
        self.size = int(self.library.llama_vocab_n_tokens(self.vocabulary))
        if adapter is not None:
            self._add(adapter, said)

    def _refused(self, path: Path, said: list[str]) -> ExportMismatch:
        return ExportMismatch(
            f"llama.cpp does not load it: {' '.join(said[-3:]) or 'no reason given'}",
            where=str(path),
            fix="report this with the message",
        )

    def _add(self, adapter: Path, said: list[str]) -> None:
        lora = self.library.llama_adapter_lora_init(self.model, str(adapter).encode())
        if lora == self.ffi.NULL:
            self.close()
            raise self._refused(adapter, said)
        adapters = self.ffi.new("struct llama_adapter_lora *[1]", [lora])
        self.library.llama_set_adapters_lora(self.handle, adapters, 1, self.ffi.new("float[1]", [1.0]))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V] fp32 for a text of its own.

        Raises:
            ExportMismatch: when llama.cpp does not compute it.
        """
        if len(ids) > self.context:  # llama.cpp would end the process
            raise ExportMismatch(
                f"{len(ids)} tokens, the context has {self.context}", fix="give shorter rows"
            )
        self.library.llama_memory_clear(self.library.llama_get_memory(self.handle), True)
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place] = int(token), place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            status = self.library.llama_decode(self.handle, batch)
        finally:
            self.library.llama_batch_free(batch)
        if status != 0:
            raise ExportMismatch(f"llama.cpp does not run it: status {status}", fix="report this")
        rows = self.library.llama_get_logits(self.handle)
        raw = self.ffi.buffer(rows, len(ids) * self.size * 4)
        return torch.frombuffer(bytearray(raw), dtype=torch.float32).view(len(ids), self.size)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, special tokens in it recognised, BOS where the file asks for it."""
        raw = text.encode("utf-8")
        room = len(raw) + 16
        ids = self.ffi.new(f"llama_token[{room}]")
        count = self.library.llama_tokenize(self.vocabulary, raw, len(raw), ids, room, True, True)
        return [int(ids[place]) for place in range(count)]

    def close(self) -> None:
        if self.handle is not None:
            self.library.llama_free(self.handle)
            self.handle = None
        if self.model is not None:
            self.library.llama_model_free(self.model)
            self.model = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
