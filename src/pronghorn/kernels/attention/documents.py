"""Where documents lie in a token stream, what a layer's attention is, and what back ends derive from both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

Derived = TypeVar("Derived")


@dataclass(frozen=True)
class Documents:
    """Where documents begin and end in a token stream.

    Make a new object for every pass: tensors derived from the offsets are kept on it. A captured pass makes its own
    inside the capture, so that a replay derives them again from whatever the offsets hold then.

    Args:
        cu_seqlens: int32 [documents + 1] offsets on the stream's device. Documents may be empty; a stream of a
            static number of documents ends in empty ones.
        max_seqlen: the longest document, in tokens, or more.
        lengths: the same lengths on the host, where they are known without a device synchronisation.
        seen_to: int32 [tokens], the place in the stream from which each token sees nothing more: at least the one after
            it, and never less than that of the token before (tokens of an image, say, see to its end). None: plain
            causal attention.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] | None = None
    seen_to: Tensor | None = None
    _derived: dict[object, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    def host_lengths(self) -> tuple[int, ...]:
        """Document lengths as Python integers; waits for the device when they are not known on the host."""
        if self.lengths is not None:
            return self.lengths
        return tuple(self.cu_seqlens.diff().tolist())

    @property
    def count(self) -> int:
        """Documents, empty ones included."""
        return self.cu_seqlens.shape[0] - 1

    def derive(self, key: tuple[object, ...], make: Callable[[], Derived]) -> Derived:
        """What `make` gives, made once per pass for all layers.

        What an eager pass made is not used in a capture, whose replays would read offsets of the past, nor the other
        way round: what a capture makes exists only once it is replayed.
        """
        if self.cu_seqlens.is_cuda:
            key = (*key, torch.cuda.is_current_stream_capturing())
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]  # type: ignore[return-value]

    def document_of_token(self, tokens: int) -> Tensor:
        """int32 [tokens]: each token's document, without a host synchronisation."""

        def make() -> Tensor:
            position = torch.arange(tokens, dtype=torch.int32, device=self.cu_seqlens.device)
            # The last document that begins at or before the token: empty ones before it begin there too.
            return torch.searchsorted(self.cu_seqlens, position, right=True, out_int32=True) - 1

        return self.derive(("document_of_token", tokens), make)

    def padded(self, count: int) -> tuple[Tensor, Tensor]:
        """cu_seqlens [count + 1] with empty documents added at the end, and the lengths [count], both int32."""

        def make() -> tuple[Tensor, Tensor]:
            cu = self.cu_seqlens
            if count > self.count:
                cu = torch.cat([cu, cu[-1:].expand(count - self.count)])
            return cu, cu.diff()

        return self.derive(("padded", count), make)

    def element_offsets(self, count: int, elements: int) -> Tensor:
        """int64 [count + 1, 1, 1, 1]: where each of `count` documents begins in a tensor of `elements` a token."""
        return self.derive(
            ("element_offsets", count, elements),
            lambda: (self.padded(count)[0].to(torch.int64) * elements).view(-1, 1, 1, 1),
        )


@dataclass(frozen=True)
class AttentionCall:
    """What one layer's attention needs besides its tensors.

    Args:
        scale: factor of the logits.
        window: how many keys a token sees, itself included; None: all before it.
        backend: a name that `choose_backend` gave.
        softcap: logits become softcap · tanh(logits / softcap).
        sinks: [N], a learned logit per head that takes part in the softmax's denominator and carries no value.
    """

    scale: float
    window: int | None
    backend: str
    softcap: float | None = None
    sinks: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Run:
    """`count` neighbouring documents of equal `length`, the first of them number `first`, from token `start`."""

    first: int
    count: int
    start: int
    length: int

    def rows(self, x: Tensor) -> Tensor:
        """[T, ...] -> [count, length, ...] view."""
        part = x[self.start : self.start + self.count * self.length]
        return part.view(self.count, self.length, *x.shape[1:])

    def batch(self, x: Tensor) -> Tensor:
        """[T, N, ...] -> [count, N, length, ...] view."""
        return self.rows(x).transpose(1, 2)

    def allowed(self, docs: Documents, window: int | None) -> Tensor | None:
        """Boolean mask [length, length], or [count, 1, length, length] by `seen_to`; None where plain causal."""
        narrow = window is not None and window < self.length
        if not narrow and docs.seen_to is None:
            return None
        position = torch.arange(self.length, device=docs.cu_seqlens.device)
        distance = position[:, None] - position[None, :]
        allowed = distance >= 0
        if docs.seen_to is not None:
            key = self.rows(torch.arange(docs.seen_to.shape[0], device=position.device))
            allowed = key[:, None, None, :] < self.rows(docs.seen_to)[:, None, :, None]
        return allowed & (distance < window) if narrow else allowed


def runs(docs: Documents) -> Iterator[Run]:
    """The stream as runs of equally long documents, empty ones left out."""
    first = start = 0
    for length, group in groupby(docs.host_lengths()):
        count = len(list(group))
        if length > 0:
            yield Run(first, count, start, length)
        first, start = first + count, start + count * length
