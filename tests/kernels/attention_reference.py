"""The formula of attention on a packed stream, written out with one dense mask; and calls of our own to compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.kernels.attention import (
    AttentionCall,
    Documents,
    attention_backward,
    attention_forward,
    attention_sink_grad,
)


@dataclass(frozen=True)
class Case:
    """One attention problem: document lengths, heads, and what is asked for besides causality."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    #: where tokens see one another both ways: begin and end in the stream, each inside one document
    blocks: tuple[tuple[int, int], ...] = ()

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def documents(self, device: torch.device) -> Documents:
        cu = torch.tensor((0, *self.lengths), device=device).cumsum(0).int()
        seen_to = None
        if self.blocks:
            seen_to = torch.arange(1, sum(self.lengths) + 1, dtype=torch.int32, device=device)
            for begin, end in self.blocks:
                seen_to[begin:end] = end
        return Documents(cu, max(self.lengths), self.lengths, seen_to)

    def inputs(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """q, k, v and, where asked for, sinks: numbers that `dtype` holds exactly, in fp64, requiring gradients."""
        generator = torch.Generator().manual_seed(sum(self.lengths) + self.head_dim)
        total = sum(self.lengths)
        shapes = [(total, self.heads, self.head_dim), *[(total, self.kv_heads, self.head_dim)] * 2]
        shapes += [(self.heads,)] if self.sinks else []
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [x.to(dtype).double().to(device).requires_grad_() for x in drawn]

    def allowed(self) -> Tensor:
        """Which key (column) each query (row) of the stream sees."""
        document = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        place = torch.cat([torch.arange(n) for n in self.lengths])
        distance = place[:, None] - place[None]
        seen = distance >= 0
        for begin, end in self.blocks:
            seen[begin:end, begin:end] = True
        if self.window is not None:
            seen = seen & (distance < self.window)
        return seen & (document[:, None] == document[None])

    def formula(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """softmax(softcap(scale · QKᵀ) + mask, with a column for the sink) V."""
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        logits = torch.einsum("tnd,snd->nts", q, k) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits.masked_fill(~self.allowed().to(q.device), float("-inf"))
        if sinks is not None:
            column = sinks.to(logits.dtype)[:, None, None].expand(-1, len(q), 1)
            logits = torch.cat([logits, column], dim=-1)
        return torch.einsum("nts,snd->tnd", logits.softmax(-1)[..., : len(q)], v)

    def ours(self, backend: str, inputs: list[Tensor], dout: Tensor, docs: Documents) -> dict[str, Tensor]:
        """Output and gradients of an implementation."""
        q, k, v = (x.detach() for x in inputs[:3])
        call = AttentionCall(
            self.scale, self.window, backend, self.softcap, inputs[3].detach() if self.sinks else None
        )
        out, lse = attention_forward(q, k, v, docs, call)
        grads = attention_backward(dout, q, k, v, out, lse, docs, call)
        found = dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))
        if self.sinks:
            found["dsinks"] = attention_sink_grad(dout, out, lse, call)
        return found

    def truth(self, inputs: list[Tensor], dout: Tensor) -> dict[str, Tensor]:
        """The formula's output and gradients in the inputs' dtype."""
        out = self.formula(*inputs)
        grads = torch.autograd.grad(out, inputs, dout.to(out.dtype))
        return dict(zip(("out", "dq", "dk", "dv", "dsinks"), (out, *grads), strict=False))


def assert_as_good(ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """|ours - truth| ≤ 1.2 · |plain - truth| + roundings, by norm; `plain` is the formula in the low precision.

    In 16 bits the plain formula keeps the softmax in the low precision, and one rounding of the result is allowed on
    top. In fp32 and fp64 both are near the truth, and only the order of sums differs. dq and dk are differences of
    terms as large as dv (of a lone token nothing remains), and carry those terms' rounding.
    """
    for name, exact in truth.items():
        actual = ours[name]
        assert actual.shape == exact.shape, name
        assert not actual.isnan().any(), f"{name}: memory that nobody wrote"
        dtype = ours["out"].dtype
        roundings = (1 if dtype.itemsize == 2 else 8) * torch.finfo(dtype).eps
        size = max(exact.norm(), truth["dv"].norm()) if name in ("dq", "dk") else exact.norm()
        ceiling = 1.2 * (plain[name].double() - exact).norm() + roundings * size
        error = (actual.double() - exact).norm()
        assert error <= ceiling, f"{name}: error {error:.2e}, allowed {ceiling:.2e}"
