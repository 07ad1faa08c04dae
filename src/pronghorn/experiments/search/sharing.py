"""A base model in several processes of one machine, its weights there but once.

What a base is made of is pickled, and the memory of its tensors is not: on a GPU a process opens another's by CUDA's
inter-process handles, which are good while that process lives. What lies on the host moves into an anonymous file that
every process maps for itself: pages are the same until somebody writes to one, who then has a copy that nobody else
sees. On a GPU nothing of the kind holds a writer back.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from pronghorn.engine import binding_of
from pronghorn.engine.joined import join_all
from pronghorn.weights import keep_in_place

#: Host tensors begin at multiples of this, as torch's own do: kernels take other paths where they do not.
_ALIGNMENT = 64
#: Most bytes of one write.
_PIECE = 2**30

#: Of a storage: where its bytes are; "host" with offset and size, or "gpu" with what torch makes of an open handle.
_Address = tuple[Any, ...]


class SharedBase:
    """(model, tokenizer) as a process hands it to others.

    Args:
        pickled: everything but the tensors' memory.
        memory: descriptor of the file with the host's tensors.
        size: bytes of the weights.
    """

    def __init__(self, pickled: bytes, memory: int, size: int) -> None:
        self.pickled, self.memory, self.size = pickled, memory, size

    def __reduce__(self) -> tuple[Callable[..., SharedBase], tuple[Any, ...]]:
        from multiprocessing.reduction import DupFd

        return _received, (self.pickled, DupFd(self.memory), self.size)

    def open(self) -> tuple[Any, Any]:
        """The base on the same memory. Raises whatever keeps this process from it."""
        model, tokenizer = _Opener(self.pickled, self.memory).load()
        binding = binding_of(model)
        if binding is not None and next(model.parameters()).is_cuda:
            binding.elsewhere = self.size
        return model, tokenizer

    def close(self) -> None:
        """Let go of the file; who has opened the base keeps it."""
        os.close(self.memory)


def _received(pickled: bytes, descriptor: Any, size: int) -> SharedBase:
    return SharedBase(pickled, descriptor.detach(), size)


def share(model: Any, tokenizer: Any) -> tuple[SharedBase, list[Any]]:
    """Hand out a loaded base without an adapter; it is frozen, and its weights stay where they are from now on.

    On a GPU the weights that products take as one are laid side by side before, since nobody can do that later.

    Returns:
        what other processes open, and what has to be kept for as long as one of them has it open. Raises whatever keeps
        it from being shared.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no anonymous files")
    model.requires_grad_(False)
    binding = binding_of(model)
    if binding is not None and binding.bound:
        join_all(binding)
    keep_in_place([*model.parameters(), *model.buffers()])
    written = io.BytesIO()
    pickler = _Pickler(written)
    pickler.dump((model, tokenizer))
    memory = pickler.move_to_file()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    size = sum(storage.nbytes() for storage, _ in pickler.storages.values())
    return SharedBase(written.getvalue(), memory, size), [storage for storage, _ in pickler.storages.values()]


class _Pickler(pickle.Pickler):
    """Writes storages as addresses. Tensors keep class and attributes, and those of one storage share it again."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        #: by the storage's identity: the storage, and where its bytes are
        self.storages: dict[int, tuple[torch.UntypedStorage, _Address]] = {}
        self._on_host: dict[int, list[Tensor]] = {}
        self._end = 0

    def persistent_id(self, value: Any) -> Any:
        return self._address(value) if isinstance(value, torch.UntypedStorage) else None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        kind = type(value)
        if value.layout is not torch.strided or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise pickle.PicklingError(f"a {kind.__name__} has no memory of its own")
        storage = value.untyped_storage()
        if storage.device.type == "cpu":
            self._on_host.setdefault(storage._cdata, []).append(value)
        made = (storage, value.dtype, value.storage_offset(), tuple(value.shape), value.stride())
        return _tensor_of, (kind, *made), value.__dict__ or None, None, None, _set_attributes

    def _address(self, storage: torch.UntypedStorage) -> _Address:
        known = self.storages.get(storage._cdata)
        if known is None:
            known = self.storages[storage._cdata] = storage, self._new_address(storage)
        return known[1]

    def _new_address(self, storage: torch.UntypedStorage) -> _Address:
        if storage.device.type == "cpu":
            start, self._end = self._end, -(-(self._end + storage.nbytes()) // _ALIGNMENT) * _ALIGNMENT
            return "host", start, storage.nbytes()
        if storage.device.type != "cuda":
            raise pickle.PicklingError(f"memory of the device '{storage.device}' is not shared")
        return "gpu", *reductions.reduce_tensor(_bytes_of(storage))[1]

    def move_to_file(self) -> int:
        """Bring what lies on the host into a file and have the tensors lie there; returns its descriptor."""
        self.clear_memo()  # in which the storages are, too
        memory = os.memfd_create("pronghorn-base")
        try:
            self._move_to(memory)
        except BaseException:
            os.close(memory)
            raise
        return memory

    def _move_to(self, memory: int) -> None:
        os.ftruncate(memory, self._end)
        mapped = _Mapping(memory)
        for key, tensors in self._on_host.items():
            storage, (_, start, _) = self.storages[key]
            _write(memory, memoryview(_bytes_of(storage).numpy()), start)
            moved = mapped.storage(start, storage.nbytes())
            for tensor in tensors:
                place = tensor.storage_offset(), tensor.shape, tensor.stride()
                tensor.data = torch.empty(0, dtype=tensor.dtype).set_(moved, *place)
            # By now nothing but this holds the old place.
            self.storages[key] = moved, ("host", start, storage.nbytes())


class _Opener(pickle.Unpickler):
    """Reads what `_Pickler` wrote."""

    def __init__(self, pickled: bytes, memory: int) -> None:
        super().__init__(io.BytesIO(pickled))
        self._storages: dict[_Address, torch.UntypedStorage] = {}
        self._mapped = _Mapping(memory)

    def persistent_load(self, address: _Address) -> torch.UntypedStorage:
        if address not in self._storages:
            self._storages[address] = self._open(*address)
        return self._storages[address]

    def _open(self, place: str, *where: Any) -> torch.UntypedStorage:
        if place == "host":
            return self._mapped.storage(*where)
        storage: torch.UntypedStorage = reductions.rebuild_cuda_tensor(*where).untyped_storage()
        return storage


class _Mapping:
    """A file's bytes as this process sees them: what it writes stays with it."""

    def __init__(self, memory: int) -> None:
        size = os.fstat(memory).st_size
        # No swap is set aside for pages that nobody is going to write to.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        self._mapped = mmap.mmap(memory, size, flags=flags) if size else None

    def storage(self, start: int, size: int) -> torch.UntypedStorage:
        if size == 0 or self._mapped is None:
            return torch.UntypedStorage(0)
        found: Tensor = torch.frombuffer(self._mapped, dtype=torch.uint8, count=size, offset=start)
        return found.untyped_storage()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _write(memory: int, content: memoryview, start: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(memory, content[done : done + _PIECE], start + done)


def _tensor_of(
    kind: type[Tensor],
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    plain = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)
    return plain if kind is Tensor else Tensor._make_subclass(kind, plain, False)


def _set_attributes(tensor: Tensor, attributes: dict[str, Any]) -> None:
    tensor.__dict__.update(attributes)
