"""The kernels of linear attention on this machine, forward and backward, against formulas in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pronghorn.diagnostics.compare import Comparison, close, device, draw, dtypes
from pronghorn.diagnostics.kernel_checks import EPS, said
from pronghorn.kernels.attention import Documents
from pronghorn.kernels.delta_rule import EPS as UNIT_EPS
from pronghorn.kernels.delta_rule import delta_rule_backward, delta_rule_forward
from pronghorn.kernels.gated_output import gated_output_backward, gated_output_forward
from pronghorn.kernels.short_conv import short_conv_backward, short_conv_forward

#: of documents: several in a chunk of 64 tokens, and one of several chunks
LENGTHS = (7, 90, 1, 42)


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


def _recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    q, k = (x * (x.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt() for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[1] // k.shape[1], 1) for x in (q * q.shape[2] ** -0.5, k))
    outs, begins = [], {sum(LENGTHS[:i]) for i in range(len(LENGTHS))}
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
