"""The kernels of linear attention on this machine, forward and backward, against formulas in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pronghorn.diagnostics.compare import Comparison, close, device, draw, dtypes
from pronghorn.diagnostics.kernel_checks import EPS, said
from pronghorn.kernels.attention import Documents
from pronghorn.kernels.delta_rule import EPS as UNIT_EPS
from pronghorn.kernels.delta_rule import delta_rule_backward, delta_rule_continued, delta_rule_forward
from pronghorn.kernels.delta_step import DeltaWeights, delta_rule_step, short_conv_step
from pronghorn.kernels.gated_output import gated_output_backward, gated_output_forward
from pronghorn.kernels.short_conv import short_conv_backward, short_conv_forward

#: of documents: several in a chunk of 64 tokens, and one of several chunks
LENGTHS = (7, 90, 1, 42)
#: tokens of two sequences that go on one by one
STEPS = 5


def _document() -> Tensor:
    return _docs().document_of_token(sum(LENGTHS))


def _docs() -> Documents:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(device(), torch.int32)
    return Documents(bounds, max(LENGTHS))


def short_conv() -> str:
    """The convolution over documents, and its gradients."""
    compared, document, channels = Comparison(), _document(), 136
    for dtype in dtypes():
        x, dy = (draw(sum(LENGTHS), channels, dtype=dtype, seed=i) for i in range(2))
        weight, bias = draw(channels, 4, dtype=dtype, seed=2), draw(channels, dtype=dtype, seed=3)
        leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
        parts = [torch.nn.functional.pad(part.t()[None], (3, 0)) for part in leaves[0].split(LENGTHS)]
        rows = [torch.nn.functional.conv1d(p, leaves[1][:, None], leaves[2], groups=channels) for p in parts]
        truth = torch.nn.functional.silu(torch.cat([part[0].t() for part in rows]))
        compared.near("y", short_conv_forward(x, weight, bias, document), truth)
        found = short_conv_backward(dy, x, weight, bias, document, need_weight_grad=True)
        _near(compared, ("dx", "dweight", "dbias"), found, torch.autograd.grad(truth, leaves, dy.double()))
    return said(compared)


def gated_output() -> str:
    """Gates of an attention's output with and without a norm, and their gradients."""
    compared = Comparison()
    for dtype in dtypes():
        out, gate, dy = (draw(37, 3, 80, dtype=dtype, seed=i) for i in range(3))
        for weight in (None, draw(80, dtype=dtype, seed=3)):
            leaves = [t.double().requires_grad_() for t in (out, gate, weight) if t is not None]
            truth = leaves[0] * leaves[1].sigmoid()
            if weight is not None:
                truth = truth * leaves[1] * leaves[2]
                truth = truth * (leaves[0].square().mean(-1, keepdim=True) + EPS).rsqrt()
            grads = torch.autograd.grad(truth, leaves, dy.double())
            compared.near("y", gated_output_forward(out, gate, weight=weight, eps=EPS), truth)
            found = gated_output_backward(dy, out, gate, weight=weight, eps=EPS, need_weight_grad=True)
            _near(compared, ("dout", "dgate", "dweight"), found, grads)
    return said(compared)


def delta_rule() -> str:
    """The gated delta rule in chunks against the recurrence token by token."""
    compared, docs, tokens = Comparison(), _docs(), sum(LENGTHS)
    for dtype in dtypes():
        q, k = (draw(tokens, 2, 64, dtype=dtype, seed=i) for i in range(2))
        v, dout = (draw(tokens, 4, 64, dtype=dtype, seed=i) for i in (2, 3))
        decay, step = (draw(tokens, 4, dtype=torch.float32, seed=i) for i in (4, 5))
        given = (q, k, v, -0.2 * decay.abs(), step.sigmoid())
        leaves = [t.double().requires_grad_() for t in given]
        truth = _recurrence(*leaves)
        grads = torch.autograd.grad(truth, leaves, dout.double())
        found = (delta_rule_forward(*given, docs), *delta_rule_backward(dout, *given, docs))
        # Factors of several products in a row are rounded to 16 bits: three times what one product may be off.
        bound = 12 * max(torch.finfo(dtype).eps / 2, 1e-6)
        for name, got, want in zip(
            ("out", "dq", "dk", "dv", "dg", "dbeta"), found, (truth.detach(), *grads), strict=True
        ):
            close(compared, name, got, want, dtype, bound=bound)
    return said(compared)


def delta_step() -> str:
    """Two sequences that go on token by token, in slots that lie in another order, against the recurrence from their
    beginning; and the same tokens once more, all of them from the states that they left."""
    compared, heads, size = Comparison(), 4, 32
    slots = torch.tensor([2, 0], dtype=torch.int32, device=device())
    docs = Documents(torch.tensor([0, STEPS, 2 * STEPS], device=device()).int(), STEPS, (STEPS, STEPS))
    for dtype in dtypes():
        x, z = (draw(2 * STEPS, n * size, dtype=dtype, seed=n) for n in (2 * heads, heads))
        b, a = (draw(2 * STEPS, heads, dtype=dtype, seed=i) for i in (1, 2))
        taps, norm = draw(2 * heads * size, 4, dtype=dtype, seed=3), draw(size, dtype=dtype, seed=5)
        decay, bias = (draw(heads, dtype=torch.float32, seed=i) for i in (6, 7))
        memory, states = x.new_zeros(3, 3, x.shape[1]), decay.new_zeros(3, heads, size, size)
        weights, ys, reads = DeltaWeights(decay, bias, norm, EPS), [], []
        for t in range(STEPS):
            ys.append(short_conv_step(x[t::STEPS], taps, None, memory, slots))
            gate, of_b, of_a = (part[t::STEPS] for part in (z, b, a))
            reads.append(delta_rule_step(ys[t], gate, of_b, of_a, weights, states, slots))
        y, read = (torch.stack(part, 1).flatten(0, 1) for part in (ys, reads))
        compared.near("y", y, _convolved(x, taps), slack=4.0)
        g = -decay.double().exp() * torch.nn.functional.softplus(a.double() + bias.double())
        beta = b.double().sigmoid()
        q, k, v = y.view(2 * STEPS, -1, size).split([heads // 2, heads // 2, heads], 1)
        twice = (
            torch.cat([part.unflatten(0, (2, STEPS))] * 2, 1).flatten(0, 1) for part in (q, k, v, g, beta)
        )
        q2, k2, v2, g2, beta2 = (part.double() for part in twice)
        out = _recurrence(q2, k2, v2, g2, beta2, (2 * STEPS, 2 * STEPS)).view(2, 2 * STEPS, heads, size)
        first, then = (part.flatten(0, 1) for part in out.split(STEPS, 1))
        gate, wide = z.double().view_as(first), norm.double()
        normed = first * (first.square().mean(-1, keepdim=True) + EPS).rsqrt() * wide
        compared.near("read", read, (normed * gate * gate.sigmoid()).flatten(1), slack=4.0)
        found = delta_rule_continued(q, k, v, g.float(), beta.float(), docs, states[slots.long()])
        close(compared, "continued", found, then, dtype, bound=12 * max(torch.finfo(dtype).eps / 2, 1e-6))
    return said(compared)


def _convolved(x: Tensor, taps: Tensor) -> Tensor:
    """silu of the convolution of two sequences in fp64."""
    rows = torch.nn.functional.pad(x.double().view(2, STEPS, -1).transpose(1, 2), (3, 0))
    z = torch.nn.functional.conv1d(rows, taps.double()[:, None], groups=x.shape[1])
    return torch.nn.functional.silu(z).transpose(1, 2).flatten(0, 1)


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lengths: Sequence[int] = LENGTHS
) -> Tensor:
    q, k = (x * (x.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt() for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[1] // k.shape[1], 1) for x in (q * q.shape[2] ** -0.5, k))
    outs, begins = [], {sum(lengths[:i]) for i in range(len(lengths))}
    state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
    for t in range(v.shape[0]):
        state = state * 0 if t in begins else state * g[t].exp()[:, None, None]
        error = beta[t][:, None] * (v[t] - torch.einsum("ndf,nd->nf", state, k[t]))
        state = state + k[t][:, :, None] * error[:, None]
        outs.append(torch.einsum("ndf,nd->nf", state, q[t]))
    return torch.stack(outs)


def _near(
    compared: Comparison, names: Sequence[str], found: Sequence[Tensor | None], wanted: Sequence[Tensor]
) -> None:
    for name, got, want in zip(names, (t for t in found if t is not None), wanted, strict=False):
        compared.near(name, got, want, slack=4.0)
