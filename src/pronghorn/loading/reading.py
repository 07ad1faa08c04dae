"""Weights from safetensors files straight to a GPU, read by several threads through pinned memory.

Transformers maps the files and copies each tensor from there: pages are mapped one by one, and what is not pinned is
copied a second time by the driver. Here each thread reads a piece into a pinned buffer of its own, and the copy to the
GPU runs while others read.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from pronghorn.errors import CheckpointCorrupt
from pronghorn.loading.checkpoint import read_header

#: names of dtypes in safetensors headers
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

#: threads that read, and bytes that each of them reads at a time: the pinned memory this takes
_THREADS, _PIECE = 8, 16 << 20


class StoredTensor:
    """A tensor in a file, read when it is indexed by `...`: what Transformers expects of a checkpoint's entries."""

    def __init__(self, reader: WeightReader, file: int, start: int, dtype: str, shape: list[int]) -> None:
        self._reader, self._file, self._start = reader, file, start
        self._dtype, self._shape = dtype, shape

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return self._dtype

    def __getitem__(self, index: EllipsisType) -> Tensor:
        return self._reader.read(self._file, self._start, DTYPES[self._dtype], self._shape)


class WeightReader:
    """Reads tensors of safetensors files onto a device. A context manager: what it holds is given back at the end.

    Any number of threads may call `read` at once. Host memory, for a GPU: a buffer of 16 MiB for each of eight threads
    and for each that calls.

    Args:
        piece: bytes that a thread reads at a time.
    """

    def __init__(self, device: torch.device, *, piece: int = _PIECE) -> None:
        self.device, self._piece = device, piece
        self._files: list[int] = []
        self._own, self._closed = threading.local(), False
        self._callers, self._none_left = 0, threading.Condition()
        self._threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "pronghorn-weights")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True  # not `cancel_futures`: who waits for a cancelled one would wait forever
        self._threads.shutdown()
        with self._none_left:  # threads of Transformers go on for a moment after an error
            self._none_left.wait_for(lambda: self._callers == 0)
        for file in self._files:
            os.close(file)

    def open(self, paths: Iterable[Path]) -> dict[str, StoredTensor]:
        """All tensors of some files by name, in dtypes of `DTYPES`; of those of one name the last file's.

        Raises:
            CheckpointCorrupt: for a damaged header.
        """
        found = {}
        for path in paths:
            header = read_header(path)
            file = os.open(path, os.O_RDONLY)
            self._files.append(file)
            data = 8 + int.from_bytes(os.pread(file, 8, 0), "little")
            for name, entry in header.items():
                (begin, end), dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
                if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
                    raise CheckpointCorrupt(
                        f"{name} of {path.name} has {end - begin:,} bytes, which {dtype} {shape} does not take",
                        where=str(path),
                        fix="download or save the model again",
                    )
                found[name] = StoredTensor(self, file, data + begin, dtype, shape)
        return found

    def read(self, file: int, start: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
        """The tensor that begins at a byte of a file, on the device, ready for the current stream.

        Raises:
            OSError: when the file cannot be read or has become shorter.
        """
        with self._none_left:
            self._callers += 1
        try:
            return self._read(file, start, torch.empty(shape, dtype=dtype, device=self.device))
        finally:
            with self._none_left:
                self._callers -= 1
                self._none_left.notify_all()

    def _read(self, file: int, start: int, tensor: Tensor) -> Tensor:
        """Fill a new tensor; one of a single piece without the other threads, which would take longer to wake up."""
        if not tensor.numel():
            return tensor
        data, free = tensor.view(-1).view(torch.uint8), self._event()
        if len(data) <= self._piece:
            self._await([self._read_piece(file, start, data, free)])
            return tensor
        pieces: list[Future[Any]] = [
            self._threads.submit(self._read_piece, file, start + at, data[at : at + self._piece], free)
            for at in range(0, len(data), self._piece)
        ]
        wait(pieces)  # all: none may write into the tensor once it has been given up
        self._await(piece.result() for piece in pieces if piece.exception() is None)
        for piece in pieces:
            piece.result()  # raises its error
        return tensor

    def _await(self, copied: Iterable[Any]) -> None:
        """Let the current stream wait for copies to the GPU."""
        if self.device.type == "cuda":
            for event in copied:
                torch.cuda.current_stream(self.device).wait_event(event)

    def _event(self) -> Any:
        """The present point of the current stream: what still uses a new tensor's memory comes before it."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _read_piece(self, file: int, start: int, into: Tensor, free: Any) -> Any:
        """Read bytes into a piece of a tensor. Returns the event behind the copy, on a GPU."""
        if self._closed:
            raise OSError("the file has been closed")
        if self.device.type != "cuda":
            _fill(into, file, start)
            return None
        own = self._own
        if not hasattr(own, "buffer"):
            own.buffer = torch.empty(self._piece, dtype=torch.uint8, pin_memory=True)
            own.stream, own.copied = torch.cuda.Stream(self.device), torch.cuda.Event()
        own.copied.synchronize()  # the buffer's last piece has left it
        buffer = own.buffer[: len(into)]
        _fill(buffer, file, start)
        with torch.cuda.stream(own.stream):
            own.stream.wait_event(free)
            into.copy_(buffer, non_blocking=True)
            own.copied.record(own.stream)
        return own.copied


def _fill(buffer: Tensor, file: int, start: int) -> None:
    """Read a file's bytes into a uint8 tensor of host memory.

    Raises:
        OSError: when there are not that many.
    """
    memory = memoryview(buffer.numpy())
    if hasattr(os, "posix_fadvise"):
        # A disk begins with all of it; threads that read one file by turns look like random reads otherwise.
        os.posix_fadvise(file, start, len(memory), os.POSIX_FADV_WILLNEED)
    done = 0
    while done < len(memory):
        count = os.preadv(file, [memory[done:]], start + done)
        if not count:
            raise OSError(f"the file ends {len(memory) - done:,} bytes early")
        done += count
