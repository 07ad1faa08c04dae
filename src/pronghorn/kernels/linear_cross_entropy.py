"""Linear layer and cross-entropy in one, chunk by chunk: no [n, V] tensor exists.

    z = hidden Wᵀ (+ b) (+ s · hidden Aᵀ Bᵀ),   z ← logit_scale · z,   z ← softcap · tanh(z / softcap)
    loss = Σ_i (lse(z_i) - z_i[label_i]) / normalizer,   dz = (softmax(z) - onehot(label)) / normalizer

A chunk of logits is overwritten by its own gradient and multiplied into dhidden (and dW, db, dA, dB where those are
trained) while it is there, in forward; backward only scales. lse, loss and weight gradients are fp32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels import products
from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton
from pronghorn.kernels.loss_rows import scaled

#: How much memory there is for what exists for a moment only.
Space = Literal["short", "usual", "roomy"]
#: Bytes of a chunk of logits on a GPU, which must be tall enough to fill the matrix units: at V = 128k and bf16 128 MiB
#: are 512 rows. Where memory is not short, 1,024 rows or more: 28.4 -> 27.1 ms at V = 128k and H = 4,096 (8,192 rows,
#: H200), 15.3 -> 13.8 ms at V = 152k and H = 1,536. Taller ones gain nothing more. Where it is, 128 rows.
CHUNK_BYTES: dict[Space, int] = {"short": 40 * 2**20, "usual": 128 * 2**20, "roomy": 320 * 2**20}
#: A CPU, too, multiplies 512 rows in the time of 256.
CPU_CHUNK_BYTES = 128 * 2**20
#: Elements of logits that a CPU turns into probabilities at a time: 4 MiB in fp32, which stay in its caches.
BLOCK_ELEMENTS = 1 << 20

Lora = tuple[Tensor, Tensor, float]


def default_chunk_rows(vocabulary: int, element: int, device_type: str, space: Space = "usual") -> int:
    """Rows in a chunk of logits of `element` bytes each: a multiple of 128 where there are that many, never less than
    16."""
    limit = CPU_CHUNK_BYTES if device_type == "cpu" else CHUNK_BYTES[space]
    rows = limit // (vocabulary * element)
    return max(rows // 128 * 128, 16) if rows >= 128 else max(rows, 16)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    normalizer: Tensor | int | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of rows against labels, without a device synchronisation.

    Args:
        hidden: [n, H]. weight: [V, H] in the same dtype. labels: int64 [n]. bias: [V].
        lora: (A [R, H], B [V, R], scaling) of an adapter on the head.
        normalizer: divides the sum of losses; None means the number of labels that are not `ignore_index`.

    Returns:
        loss: 0-dim fp32, differentiable in hidden, weight, bias, A and B. 0 when there is no row.
        num_correct: 0-dim int64; rows whose label has the largest logit (a tie counts).
    """
    supervised = labels != ignore_index
    if normalizer is None:
        normalizer = supervised.sum().clamp(min=1)
    divisor: Tensor = (
        normalizer
        if isinstance(normalizer, Tensor)
        else torch.full((), float(normalizer), device=hidden.device)
    )
    divisor = divisor.to(device=hidden.device, dtype=math_dtype(hidden.dtype), non_blocking=True)
    rows = chunk_rows or default_chunk_rows(weight.shape[0], hidden.dtype.itemsize, hidden.device.type)
    a, b, scaling = lora if lora is not None else (None, None, 1.0)
    settings = _Settings(ignore_index, logit_scale, softcap, rows, scaling, use_triton(hidden, impl))
    total, num_correct = _LinearCrossEntropy.apply(hidden, weight, bias, a, b, labels, settings)
    return total / divisor, num_correct


class _Settings:
    def __init__(
        self,
        ignore_index: int,
        logit_scale: float,
        softcap: float | None,
        chunk_rows: int,
        scaling: float,
        triton: bool,
    ) -> None:
        self.ignore_index, self.logit_scale, self.softcap = ignore_index, logit_scale, softcap
        self.chunk_rows, self.scaling, self.triton = chunk_rows, scaling, triton


class _Gradients:
    """Accumulators of the gradients that are wanted; in the order hidden, weight, bias, A, B."""

    def __init__(
        self, hidden: Tensor, parameters: tuple[Tensor | None, ...], wanted: tuple[bool, ...], scaling: float
    ) -> None:
        wide = math_dtype(hidden.dtype)
        self.scaling = scaling
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight, self.bias, self.a, self.b = (
            torch.zeros(p.shape, dtype=wide, device=p.device) if p is not None and want else None
            for p, want in zip(parameters, wanted[1:], strict=True)
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias, self.a, self.b

    @property
    def any(self) -> bool:
        return any(t is not None for t in self.tensors())

    def add(
        self,
        dlogits: Tensor,
        hidden: Tensor,
        weight: Tensor,
        adapter: tuple[Tensor, Tensor, Tensor] | None,
        at: slice,
    ) -> None:
        """Take in one chunk; `adapter` is (A, B, hidden Aᵀ) in the computing dtype."""
        if self.hidden is not None:
            torch.mm(dlogits, weight, out=self.hidden[at])
        if self.weight is not None:
            _add_product_(self.weight, dlogits.t(), hidden)
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)
        if adapter is None:
            return
        a, b, xa = adapter
        dxa = (dlogits @ b).mul_(self.scaling)
        if self.hidden is not None:
            self.hidden[at].addmm_(dxa, a)
        if self.a is not None:
            _add_product_(self.a, dxa.t(), hidden)
        if self.b is not None:
            _add_product_(self.b, dlogits.t(), xa * self.scaling)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in total's dtype (fp32 for 16-bit factors, also on the GPU)."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        labels: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(hidden, (weight, bias, a, b), ctx.needs_input_grad[:5], settings.scaling)
        count, dtype = hidden.shape[0], hidden.dtype
        losses = torch.zeros(count, dtype=math_dtype(dtype), device=hidden.device)
        correct = torch.zeros(count, dtype=torch.bool, device=hidden.device)
        low_rank = None if a is None or b is None else (a.to(dtype), b.to(dtype))
        # One buffer for all chunks: on a CPU memory fresh from the system costs more than a product's share of it.
        space = hidden.new_empty(min(count, settings.chunk_rows), weight.shape[0])
        for start in range(0, count, settings.chunk_rows):
            at = slice(start, min(start + settings.chunk_rows, count))
            chunk = hidden[at]
            logits = space[: chunk.shape[0]]
            if bias is None:
                _product_(chunk, weight, logits, settings)
            else:
                torch.addmm(bias.to(dtype), chunk, weight.t(), out=logits)
            adapter = None
            if low_rank is not None:
                adapter = (*low_rank, chunk @ low_rank[0].t())
                logits.addmm_(adapter[2], adapter[1].t(), alpha=settings.scaling)
            _cross_entropy_(logits, labels[at], losses[at], correct[at], settings, gradients.any)
            gradients.add(logits, chunk, weight, adapter, at)
        # Saved, not kept on the node: it outlives backward for as long as somebody holds the loss.
        ctx.save_for_backward(*gradients.tensors())
        ctx.impl = "triton" if settings.triton else "torch"
        ctx.dtypes = [None if p is None else p.dtype for p in (hidden, weight, bias, a, b)]
        num_correct = correct.sum()
        ctx.mark_non_differentiable(num_correct)
        return losses.sum(), num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        # Not in place: a second backward (retain_graph) must find them unscaled.
        found = [
            None if g is None else scaled(g, scale, dtype, impl=ctx.impl)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*found, None, None)


def _product_(chunk: Tensor, weight: Tensor, logits: Tensor, settings: _Settings) -> None:
    """logits = chunk Wᵀ."""
    alike = chunk.dtype == weight.dtype and chunk.device == weight.device
    if settings.triton and alike and products.why_not(chunk, weight, True, 0, logits) is None:
        products.multiply(products.Product(chunk, weight, True), logits, impl="triton")
    else:
        torch.mm(chunk, weight.t(), out=logits)


def _cross_entropy_(
    logits: Tensor, labels: Tensor, losses: Tensor, correct: Tensor, settings: _Settings, need_grad: bool
) -> None:
    """Losses and hits of a chunk into `losses` and `correct`; d(sum of losses)/d(logits) over `logits`."""
    if settings.triton:
        from pronghorn.kernels.triton.cross_entropy import cross_entropy_

        cross_entropy_(
            logits,
            labels,
            losses,
            correct,
            settings.ignore_index,
            settings.logit_scale,
            settings.softcap,
            need_grad,
        )
        return
    count, vocabulary = logits.shape
    on_cpu = logits.device.type == "cpu"
    rows = min(count, max(1, BLOCK_ELEMENTS // vocabulary)) if on_cpu else count
    work = logits.new_empty(rows, vocabulary, dtype=losses.dtype)
    for start in range(0, count, rows):
        at = slice(start, start + rows)
        _cross_entropy_rows_(logits[at], labels[at], losses[at], correct[at], work, settings, need_grad)


def _cross_entropy_rows_(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor,
    work: Tensor,
    settings: _Settings,
    need_grad: bool,
) -> None:
    """`_cross_entropy_` for no more rows than `work` has, whose dtype the arithmetic is done in."""
    wide = work[: logits.shape[0]].copy_(logits)
    if settings.logit_scale != 1.0:
        wide.mul_(settings.logit_scale)
    slope = None
    if settings.softcap is not None:
        bent = wide.div_(settings.softcap).tanh_()
        slope = 1 - bent.square()
        wide.mul_(settings.softcap)
    supervised = labels != settings.ignore_index
    picked = labels.clamp(min=0)[:, None]
    target, largest = wide.gather(1, picked), wide.amax(1, keepdim=True)
    correct.copy_((target >= largest).squeeze(1) & supervised)
    total = wide.sub_(largest).exp_().sum(1, keepdim=True)
    losses.copy_((total.log() + largest - target).squeeze(1).masked_fill_(~supervised, 0.0))
    if not need_grad:
        return
    wide.div_(total).scatter_add_(1, picked, wide.new_full(picked.shape, -1.0))
    if slope is not None:
        wide.mul_(slope)
    logits.copy_(wide.mul_(supervised[:, None] * settings.logit_scale))
