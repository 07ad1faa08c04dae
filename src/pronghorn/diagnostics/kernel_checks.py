"""Every kernel, forward and backward, on this machine: what training calls, against formulas in fp64.

Kernels are looked up in their modules when a check runs, so what is checked is what training would find there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pronghorn.kernels
from pronghorn.diagnostics.checks import Unsound
from pronghorn.diagnostics.compare import Comparison, close, device, draw, dtypes
from pronghorn.kernels import dropout as dropout_kernel
from pronghorn.kernels import glu as glu_kernels
from pronghorn.kernels import glu_products, heads, loss_rows
from pronghorn.kernels import layer_norm as centred_kernels
from pronghorn.kernels import linear_cross_entropy as head_kernels
from pronghorn.kernels import lora as lora_kernels
from pronghorn.kernels import products as adapted_kernels
from pronghorn.kernels import qkv_grads as joined_kernels
from pronghorn.kernels import rms_norm as norm_kernels
from pronghorn.kernels import rope as rope_kernels
from pronghorn.kernels.dispatch import Impl, use_triton
from pronghorn.kernels.latent_heads import latent_heads_backward, latent_heads_forward
from pronghorn.kernels.lora import LowRank

#: tokens and width: no multiples of any block, so that masks are met
TOKENS, WIDTH = 37, 328
EPS = 1e-6


def said(compared: Comparison) -> str:
    way = "Triton" if use_triton(torch.empty(1, device=device(), dtype=dtypes()[0]), None) else "torch"
    return f"{way}: {compared}"


def rms_norm() -> str:
    compared = Comparison()
    for dtype in dtypes():
        x, residual, dy, carried = (draw(TOKENS, WIDTH, dtype=dtype, seed=i) for i in range(4))
        weight = draw(WIDTH, dtype=dtype, seed=5)
        y, rstd, summed = norm_kernels.rms_norm_forward(x, weight, EPS, residual=residual)
        leaves = [(x + residual).double().requires_grad_(), weight.double().requires_grad_()]
        truth = leaves[0] * (leaves[0].square().mean(1, keepdim=True) + EPS).rsqrt() * leaves[1]
        want_dx, want_dw = torch.autograd.grad(truth, leaves, dy.double())
        dx, dw = norm_kernels.rms_norm_backward(
            dy, summed, weight, rstd, eps=EPS, residual_grad=carried, need_weight_grad=True
        )
        assert dw is not None
        compared.near("y", y, truth)
        compared.near("dx", dx, want_dx + carried.double(), slack=2.0)
        compared.near("dweight", dw, want_dw, slack=4.0)
    return said(compared)


def layer_norm() -> str:
    """Of rows, and of heads that have a weight each."""
    compared = Comparison()
    for dtype in dtypes():
        for groups in (1, 4):
            x, dy, carried = (draw(4 * TOKENS, WIDTH, dtype=dtype, seed=i) for i in range(3))
            weight = draw(groups, WIDTH, dtype=dtype, seed=5).squeeze(0)
            leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
            normed = F.layer_norm(leaves[0], (WIDTH,), eps=EPS)
            truth = (normed.view(-1, *weight.shape) * leaves[1]).view(x.shape)
            want_dx, want_dw = torch.autograd.grad(truth, leaves, dy.double())
            compared.near("y", centred_kernels.layer_norm_forward(x, weight, EPS), truth)
            dx, dw = centred_kernels.layer_norm_backward(
                dy, x, weight, eps=EPS, residual_grad=carried, need_weight_grad=True
            )
            assert dw is not None
            compared.near("dx", dx, want_dx + carried.double(), slack=2.0)
            compared.near("dweight", dw, want_dw, slack=4.0)
    return said(compared)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool = False) -> Tensor:
    half = cos.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    if pairs:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos.double()[:, None] + turned * sin.double()[:, None]


def angles(dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    position = torch.arange(TOKENS, dtype=torch.float64)
    angle = position[:, None] / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    whole = torch.cat([angle, angle], 1)
    return whole.cos().to(device(), dtype), whole.sin().to(device(), dtype)


def rope() -> str:
    """Rotation forward and backward, and the rotation that takes adapters in on the way."""
    compared, dim = Comparison(), 64
    for dtype in dtypes():
        cos, sin = angles(dim, dtype)
        q, k, v = (draw(TOKENS, heads, dim, dtype=dtype, seed=heads) for heads in (4, 2, 3))
        for pairs in (False, True):
            found = rope_kernels.qk_rope_forward(q, k, cos, sin, pairs=pairs)
            leaves = [x.double().requires_grad_() for x in (q, k)]
            truth = [_rotated(x, cos, sin, pairs) for x in leaves]
            dq, dk = (draw(*x.shape, dtype=dtype, seed=9) for x in (q, k))
            grads = torch.autograd.grad(truth, leaves, [dq.double(), dk.double()])
            back = rope_kernels.qk_rope_backward(dq, dk, cos, sin, pairs=pairs)
            for i, name in enumerate(("q", "k")):
                compared.near(name, found[i], truth[i])
                compared.near(f"d{name}", back[i], grads[i])
        v = v[:, :2].contiguous()
        shares = tuple(
            LowRank(draw(TOKENS, 16, dtype=dtype, seed=i), draw(x.shape[1] * dim, 16, dtype=dtype, scale=0.2), 0.5)
            for i, x in enumerate((q, k, v))
        )  # fmt: skip
        whole = [
            x.double() + (s.scaling * s.xa.double() @ s.b.double().T).view(x.shape)
            for x, s in zip((q, k, v), shares, strict=True)
        ]
        wanted = [_rotated(whole[0], cos, sin), _rotated(whole[1], cos, sin), whole[2]]
        rope_kernels.adapted_rope_(q, k, v, cos, sin, (shares[0], shares[1], shares[2]))
        for name, got, want in zip(("q + LoRA", "k + LoRA", "v + LoRA"), (q, k, v), wanted, strict=True):
            compared.near(name, got, want, slack=2.0)
    return said(compared)


def rope_with_norms() -> str:
    compared, dim = Comparison(), 64
    for dtype in dtypes():
        cos, sin = angles(dim, dtype)
        q, k, dq, dk = (draw(TOKENS, heads, dim, dtype=dtype, seed=i) for i, heads in enumerate((4, 2, 4, 2)))
        weights = [draw(dim, dtype=dtype, seed=i) for i in (7, 8)]
        given: dict[str, Any] = {"q_norm_weight": weights[0], "k_norm_weight": weights[1], "eps": EPS}
        found = rope_kernels.qk_rope_forward(q, k, cos, sin, **given)
        leaves = [x.double().requires_grad_() for x in (q, k, *weights)]
        truth = [
            _rotated(x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * w, cos, sin)
            for x, w in zip(leaves[:2], leaves[2:], strict=True)
        ]
        grads = torch.autograd.grad(truth, leaves, [dq.double(), dk.double()])
        back = rope_kernels.qk_rope_backward(dq, dk, cos, sin, q=q, k=k, need_weight_grad=True, **given)
        for i, name in enumerate(("q", "k")):
            compared.near(name, found[i], truth[i])
        for name, got, want in zip(("dq", "dk", "dq_norm", "dk_norm"), back, grads, strict=True):
            assert got is not None
            compared.near(name, got, want, slack=4.0)
    return said(compared)


def latent_heads() -> str:
    """Heads out of the codes of latent attention, turned in pairs and in halves, and their gradients."""
    compared, nope, half, of_v, heads = Comparison(), 48, 16, 40, 5
    for dtype in dtypes():
        cos, sin = (x[:, :half] for x in angles(2 * half, dtype))
        for pairs in (True, False):
            q, dq, dk = (draw(TOKENS, heads, nope + 2 * half, dtype=dtype, seed=i) for i in range(3))
            pair = draw(TOKENS, heads, nope + of_v, dtype=dtype, seed=3)
            shared, dv = draw(TOKENS, 2 * half, dtype=dtype, seed=4), draw(TOKENS, heads, of_v, dtype=dtype)
            leaves = [x.double().requires_grad_() for x in (q, pair, shared)]
            # Where pairs are turned, the elements of the halves lie alternately.
            apart = torch.arange(2 * half, device=q.device)
            apart = apart.view(half, 2).t().reshape(-1) if pairs else apart
            ends = (leaves[0][..., nope:], leaves[2][:, None])
            whole = [torch.cat([x, x], 1) for x in (cos, sin)]
            turned = [_rotated(x[..., apart], whole[0], whole[1])[..., apart.argsort()] for x in ends]
            key = turned[1].expand(-1, heads, -1)
            truth = [
                torch.cat([leaves[0][..., :nope], turned[0]], -1),
                torch.cat([leaves[1][..., :nope], key], -1),
                leaves[1][..., nope:],
            ]
            grads = torch.autograd.grad(truth, leaves, [x.double() for x in (dq, dk, dv)])
            made = latent_heads_forward(q, pair, shared, cos, sin, nope=nope, pairs=pairs)
            back = latent_heads_backward(dq, dk, dv, cos, sin, pairs=pairs)
            names = ("q", "k", "v", "dq", "dpair", "dshared")
            for name, got, want in zip(names, (q, *made, dq, *back), (*truth, *grads), strict=True):
                compared.near(name, got, want, slack=2.0)
    return said(compared)


def joined_gradients() -> str:
    """Gradients of q, k and v rotated back and laid side by side."""
    compared, dim = Comparison(), 64
    for dtype in dtypes():
        cos, sin = angles(dim, dtype)
        dq, dk, dv = (draw(TOKENS, heads, dim, dtype=dtype, seed=i) for i, heads in enumerate((4, 2, 2)))
        leaves = [x.double().requires_grad_() for x in (dq, dk)]
        wanted = torch.autograd.grad(
            [_rotated(x, cos, sin) for x in leaves], leaves, [dq.double(), dk.double()]
        )
        truth = [x.flatten(1) for x in (*wanted, dv.double())]
        for name, got, want in zip(
            ("dQ", "dK", "dV"), joined_kernels.unrotate_joined(dq, dk, dv, cos, sin), truth, strict=True
        ):
            compared.near(name, got, want)
    return said(compared)


def glu() -> str:
    compared = Comparison()
    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    for dtype in dtypes():
        both = draw(TOKENS, 2 * WIDTH, dtype=dtype, scale=3.0)
        gate, up = both[:, :WIDTH], both[:, WIDTH:]
        dact = draw(TOKENS, WIDTH, dtype=dtype, seed=2)
        for activation, formula in formulas.items():
            leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
            truth = formula(leaves[0]) * leaves[1]
            grads = torch.autograd.grad(truth, leaves, dact.double())
            found = glu_kernels.glu_backward(dact, gate, up, activation)
            compared.near(activation, glu_kernels.glu_forward(gate, up, activation), truth)
            for got, want in zip(found, (truth.detach(), *grads), strict=True):
                compared.near(f"d{activation}", got, want)
    return said(compared)


def glu_with_adapters() -> str:
    """Gate and up that lack their adapters' share, and the down projection's adapter formed along the way."""
    compared = Comparison()
    for dtype in dtypes():
        gate, up, dact = (draw(TOKENS, WIDTH, dtype=dtype, seed=i) for i in range(3))
        shares = [
            LowRank(draw(TOKENS, 16, dtype=dtype, seed=3 + i, scale=0.3),
                    draw(WIDTH, 16, dtype=dtype, seed=5 + i, scale=0.3), 0.5 + i)
            for i in range(2)
        ]  # fmt: skip
        a, dxa = (
            draw(16, WIDTH, dtype=dtype, seed=7, scale=0.3),
            draw(TOKENS, 16, dtype=dtype, seed=8, scale=0.3),
        )
        given: dict[str, Any] = {"gate_adapter": shares[0], "up_adapter": shares[1]}
        leaves = [s.add_to(x.double()).requires_grad_() for x, s in zip((gate, up), shares, strict=True)]
        truth = F.silu(leaves[0]) * leaves[1]
        act, xa = glu_kernels.glu_forward_down(gate, up, "silu", a, **given)
        compared.near("act", act, truth, slack=2.0)
        compared.near("act Aᵀ", xa, act.double() @ a.double().T, slack=2.0)
        grads = torch.autograd.grad(truth, leaves, dact.double(), retain_graph=True)
        found = glu_kernels.glu_backward(dact, gate, up, "silu", **given)
        for name, got, want in zip(("act", "dgate", "dup"), found, (truth.detach(), *grads), strict=True):
            compared.near(name, got, want, slack=2.0)
        grads = torch.autograd.grad(truth, leaves, dact.double() + dxa.double() @ a.double())
        a_grad = torch.zeros(a.shape, dtype=torch.float32, device=a.device)
        glu_kernels.glu_backward_down_(dact, gate, up, "silu", dxa, a, a_grad, **given)
        # The torch way rounds the sum of both shares of dact before it goes on.
        compared.near("dgate", gate, grads[0], slack=8.0)
        compared.near("dup", up, grads[1], slack=8.0)
        close(compared, "dA", a_grad, dxa.double().T @ truth.detach(), dtype)
    return said(compared)


def glu_in_products() -> str:
    """The unit made by the product before it and taken back through by the one behind it."""
    compared = Comparison()
    for dtype in (torch.bfloat16, torch.float16):
        x, dy = draw(TOKENS, WIDTH, dtype=dtype), draw(TOKENS, WIDTH, dtype=dtype, seed=1)
        weights = [draw(WIDTH, WIDTH, dtype=dtype, seed=2 + i, scale=WIDTH**-0.5) for i in range(3)]
        xa, dxa = (draw(TOKENS, rank, dtype=dtype, seed=5 + rank, scale=0.3) for rank in (32, 16))
        bs, a = (
            [draw(WIDTH, 16, dtype=dtype, seed=7 + i, scale=0.3) for i in range(2)],
            draw(16, WIDTH, dtype=dtype),
        )
        call = glu_products.GateUp(x, weights[0], weights[1], "silu", xa, bs[0], bs[1], a)
        gate, up, act, of_down = glu_products.gate_up_act(call)
        assert gate is not None and up is not None and of_down is not None
        for i, (name, found) in enumerate((("gate", gate), ("up", up))):
            share = xa[:, 16 * i : 16 * (i + 1)].double() @ bs[i].double().T
            compared.near(name, found, x.double() @ weights[i].double().T + share, slack=2.0)
        leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
        truth = F.silu(leaves[0]) * leaves[1]
        compared.near("act", act, truth, slack=2.0)
        compared.near("act Aᵀ", of_down, act.double() @ a.double().T, slack=4.0)
        again = glu_products.gate_up(call)
        compared.near("gate again", again[0], gate)
        dact = dy.double() @ weights[2].double() + dxa.double() @ a.double()
        grads = torch.autograd.grad(truth, leaves, dact)
        a_grad = torch.zeros(a.shape, dtype=torch.float32, device=a.device)
        glu_products.down_backward_(glu_products.DownGrad(dy, weights[2], gate, up, "silu", dxa, a, a_grad))
        compared.near("dgate", gate, grads[0], slack=3.0)
        compared.near("dup", up, grads[1], slack=3.0)
        close(compared, "dA", a_grad, dxa.double().T @ truth.detach(), dtype)
    return said(compared)


def adapted_products() -> str:
    compared = Comparison()
    for dtype in dtypes():
        x, xa, residual = (draw(TOKENS, n, dtype=dtype, seed=i) for i, n in enumerate((WIDTH, 16, 72)))
        w, b = draw(72, WIDTH, dtype=dtype, seed=3, scale=0.1), draw(72, 16, dtype=dtype, seed=4, scale=0.3)
        truth = x.double() @ w.double().T + xa.double() @ b.double().T
        for name, added in (("Y", None), ("residual + Y", residual)):
            product = adapted_kernels.Product(x, w, True, xa, b, added)
            whole = truth if added is None else truth + added.double()
            compared.near(name, adapted_kernels.multiply(product), whole)
        product = adapted_kernels.Product(x, w.T.contiguous(), False, xa, b.T.contiguous())
        compared.near("dX", adapted_kernels.multiply(product), truth)
        _rotated_heads(compared, dtype)
    return said(compared)


def _rotated_heads(compared: Comparison, dtype: torch.dtype) -> None:
    """Two heads of q and two of k and v, with adapters of rank 8."""
    wide = (256, 256, 256)
    x, xa = draw(TOKENS, WIDTH, dtype=dtype), draw(TOKENS, 24, dtype=dtype, seed=1)
    w = draw(sum(wide), WIDTH, dtype=dtype, seed=2, scale=0.1)
    bs = [draw(width, 8, dtype=dtype, seed=3 + i, scale=0.3) for i, width in enumerate(wide)]
    angles = draw(TOKENS, 128, dtype=dtype, seed=6)
    cos, sin = angles.double().cos().to(dtype), angles.double().sin().to(dtype)
    found = heads.rotated_heads(heads.Heads(x, w, wide, xa, (bs[0], bs[1], bs[2]), cos, sin))
    base = (x.double() @ w.double().T).split(wide, 1)
    shares = xa.double().split(8, 1)
    for name, got, part, share, b in zip("qkv", found, base, shares, bs, strict=True):
        truth = part + share @ b.double().T
        if name != "v":
            truth = rope_kernels.rotate(truth.view(TOKENS, 2, 128), cos, sin).flatten(1)
        compared.near(name, got, truth, slack=2.0)


def lora_products() -> str:
    compared = Comparison()
    impls: tuple[Impl | None, ...] = (None, "triton") if _kernels_take_lora() else (None,)
    for dtype in dtypes():
        x, xa = draw(TOKENS, WIDTH, dtype=dtype), draw(TOKENS, 40, dtype=dtype, scale=0.3)
        a = draw(40, WIDTH, dtype=dtype, seed=1, scale=0.05)
        outs, ranks, scalings = (WIDTH, 72), (8, 32), (0.5, 2.0)
        bs = [draw(o, r, dtype=dtype, seed=o, scale=0.2) for o, r in zip(outs, ranks, strict=True)]
        bases = [draw(TOKENS, o, dtype=dtype, seed=2) for o in outs]
        dys = [draw(TOKENS, o, dtype=dtype, seed=3) for o in outs]
        parts = [part.double() for part in xa.split(list(ranks), 1)]
        for got, base, part, b, s in zip(
            lora_kernels.up(xa, bs, scalings, bases), bases, parts, bs, scalings, strict=True
        ):
            compared.near("Y", got, base.double() + s * part @ b.double().T, slack=2.0)
        wide = torch.float32
        b_grads: list[Tensor | None] = [torch.zeros(b.shape, dtype=wide, device=b.device) for b in bs]
        dxa = lora_kernels.output_grads(dys, bs, scalings, xa, b_grads)
        for i, (dy, b, s) in enumerate(zip(dys, bs, scalings, strict=True)):
            compared.near("dXA", dxa.split(list(ranks), 1)[i], s * dy.double() @ b.double(), slack=2.0)
            grad = b_grads[i]
            assert grad is not None
            close(compared, "dB", grad, s * dy.double().T @ parts[i], dtype)
        both = torch.cat([draw(r, WIDTH, dtype=dtype, seed=r, scale=0.2) for r in ranks])
        again, start = lora_kernels.output_grads_and_start(dys, bs, scalings, both)
        compared.near("dXA", again, dxa.double(), slack=2.0)
        close(compared, "dXA A", start, again.double() @ both.double(), dtype)
        for impl in impls:
            compared.near("XA", lora_kernels.down(x, a, impl=impl), x.double() @ a.double().T, slack=2.0)
            a_grad = torch.zeros(a.shape, dtype=wide, device=a.device)
            lora_kernels.accumulate_a_(a_grad, xa, x, impl=impl)
            close(compared, "dA", a_grad, xa.double().T @ x.double(), dtype)
    return said(compared)


def _kernels_take_lora() -> bool:
    return lora_kernels.fits_kernels(torch.empty(1, device=device(), dtype=dtypes()[0]), [8, 32])


def cross_entropy() -> str:
    """Loss and gradients of hidden states, head, and an adapter on the head; the last chunk of rows is a short one."""
    compared = Comparison()
    rows, vocabulary = 45, 1003
    for dtype in dtypes():
        hidden = draw(rows, 96, dtype=dtype).requires_grad_()
        weight = draw(vocabulary, 96, dtype=dtype, scale=0.1).requires_grad_()
        a, b = draw(8, 96, dtype=dtype, scale=0.1), draw(vocabulary, 8, dtype=dtype, scale=0.1)
        tensors = [hidden, weight, a.requires_grad_(), b.requires_grad_()]
        labels = torch.arange(rows, device=device()) * 17 % vocabulary
        labels[3] = -100
        loss, _ = head_kernels.linear_cross_entropy(
            hidden, weight, labels, lora=(a, b, 2.0), chunk_rows=16, softcap=30.0
        )
        found = torch.autograd.grad(loss, tensors)
        leaves = [t.detach().double().requires_grad_() for t in tensors]
        logits = leaves[0] @ leaves[1].T + 2.0 * (leaves[0] @ leaves[2].T) @ leaves[3].T
        truth = F.cross_entropy(30.0 * torch.tanh(logits / 30.0), labels)
        close(compared, "loss", loss.detach(), truth.detach(), dtype)
        wanted = torch.autograd.grad(truth, leaves)
        for name, got, want in zip(("dhidden", "dhead", "dA", "dB"), found, wanted, strict=True):
            close(compared, name, got, want, dtype)
        _loss_rows(compared, found[0])
    return said(compared)


def _loss_rows(compared: Comparison, gradient: torch.Tensor) -> None:
    """A gradient scaled, and put back to every other row of a stream."""
    scale = torch.full((), 1 / 3, device=gradient.device)
    low = loss_rows.scaled(gradient, scale, gradient.dtype)
    compared.near("gradient / 3", low, gradient.double() * scale.double())
    rows = torch.arange(0, 2 * len(gradient), 2, device=gradient.device)
    stream = loss_rows.put_back(gradient, rows, 2 * len(gradient) + 1)
    want = stream.new_zeros(stream.shape).index_copy_(0, rows, gradient)
    compared.near("rows put back", stream, want.double())


def dropout() -> str:
    x = torch.ones(300, 500, device=device(), dtype=dtypes()[0])
    first, second = (dropout_kernel.seeded_dropout(x, 0.25, 11) for _ in range(2))
    if not torch.equal(first, second):
        raise Unsound("the mask of one seed differs from call to call, so a backward would use another one")
    if torch.equal(first, dropout_kernel.seeded_dropout(x, 0.25, 12)):
        raise Unsound("two seeds give the same mask")
    kept = first.ne(0)
    share = kept.double().mean().item()
    # Four standard deviations of a mean over 150,000 draws.
    if not abs(share - 0.75) <= 4 * (0.75 * 0.25 / x.numel()) ** 0.5:
        raise Unsound(f"{share:.1%} of the elements are kept where 75 % should be")
    compared = Comparison()
    compared.near("scale", first, kept.double() / 0.75)
    return said(compared)


def fast_linear() -> str:
    """`pronghorn.kernels.fast_linear_forward` on a plain linear and on PEFT's layer around one, with its backward."""
    from peft import LoraConfig, get_peft_model

    compared = Comparison()
    for dtype in dtypes():
        linear = torch.nn.Linear(WIDTH, 72, device=device(), dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(draw(72, WIDTH, dtype=dtype, scale=0.05))
            linear.bias.copy_(draw(72, dtype=dtype))
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
        layer: Any = get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            a.copy_(draw(8, WIDTH, dtype=dtype, scale=0.05))
            b.copy_(draw(72, 8, dtype=dtype, scale=0.2))
        x = draw(2, TOKENS, WIDTH, dtype=dtype).requires_grad_()
        leaves = [t.detach().double().requires_grad_() for t in (x, a, b)]
        plain = leaves[0] @ linear.weight.double().T + linear.bias.double()
        truth = plain + 2.0 * (leaves[0] @ leaves[1].T) @ leaves[2].T
        dy = draw(*truth.shape, dtype=dtype, seed=6)
        with torch.no_grad():
            compared.near(
                "plain", pronghorn.kernels.fast_linear_forward(linear, x), plain.detach(), slack=2.0
            )
        y = pronghorn.kernels.fast_linear_forward(layer, x)
        close(compared, "with LoRA", y.detach(), truth.detach(), dtype)
        grads = torch.autograd.grad(y, [x, a, b], dy)
        wanted = torch.autograd.grad(truth, leaves, dy.double())
        for name, got, want in zip(("dx", "dA", "dB"), grads, wanted, strict=True):
            close(compared, name, got, want, dtype)
    return said(compared)
