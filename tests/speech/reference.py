"""Fish-Speech's two transformers straight from their formulas, on the published tensors: for comparison."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.speech.tiny import BOOKS, CODES


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def turned(x: Tensor, base: float) -> Tensor:
    """x [S, N, D]: element pairs (2i, 2i + 1) as complex numbers, times e^(i · position / base^(2i/D)).

    The angles are fp32 in any model; their rounding is 1e-5 at some hundred positions, far above fp64's.
    """
    length, _, size = x.shape
    rates = 1.0 / base ** (torch.arange(0, size, 2).float() / size)
    angles = torch.arange(length).float()[:, None] * rates
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    factors = torch.complex(angles.cos().to(x.dtype), angles.sin().to(x.dtype))
    return torch.view_as_real(numbers * factors[:, None]).flatten(-2)


def layer(
    x: Tensor, w: dict[str, Tensor], name: str, heads: int, kv: int, size: int, base: float, eps: float
) -> Tensor:
    def get(part: str) -> Tensor:
        return w[f"{name}.{part}"]

    length = x.shape[0]
    qkv = rms(x, get("attention_norm.weight"), eps) @ get("attention.wqkv.weight").T
    if f"{name}.attention.wqkv.bias" in w:
        qkv = qkv + get("attention.wqkv.bias")
    q, k, v = qkv.view(length, -1, size).split([heads, kv, kv], dim=1)
    if f"{name}.attention.q_norm.weight" in w:
        q, k = rms(q, get("attention.q_norm.weight"), eps), rms(k, get("attention.k_norm.weight"), eps)
    q, k = turned(q, base), turned(k, base)
    k, v = (t.repeat_interleave(heads // kv, dim=1) for t in (k, v))
    logits = torch.einsum("snd,tnd->nst", q, k) / math.sqrt(size)
    logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    seen = torch.einsum("nst,tnd->snd", logits.softmax(-1), v).flatten(1)
    y = x + seen @ get("attention.wo.weight").T
    n = rms(y, get("ffn_norm.weight"), eps)
    gate, up = n @ get("feed_forward.w1.weight").T, n @ get("feed_forward.w3.weight").T
    return y + (torch.sigmoid(gate) * gate * up) @ get("feed_forward.w2.weight").T


def flat_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A nested checkpoint's tensors under the flat form's names."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("audio_decoder.") and "codebook" not in name:
            name = "fast_" + name.removeprefix("audio_decoder.")
        renamed[name.removeprefix("audio_decoder.").removeprefix("text_model.model.")] = tensor
    return renamed


def forward(w: dict[str, Tensor], c: dict[str, Any], first: int, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of both losses, and the logits, of one row.

    Args:
        w: tensors by flat names; c: sizes by flat names; first: the first semantic token.
        row: input_ids, labels [T] and codes [K, T].
    """
    eps, base = c["norm_eps"], c["rope_base"]
    ids, labels, codes = row["input_ids"], row["labels"], row["codes"]
    x = []
    for t, token in enumerate(ids.tolist()):
        e = w["embeddings.weight"][token]
        if first <= token < first + CODES:
            for k in range(BOOKS):
                e = e + w["codebook_embeddings.weight"][k * CODES + int(codes[k, t])]
            if c.get("scale_codebook_embeddings"):
                e = e / math.sqrt(BOOKS + 1)
        x.append(e)
    x = torch.stack(x)
    for i in range(c["n_layer"]):
        x = layer(x, w, f"layers.{i}", c["n_head"], c["n_local_heads"], c["head_dim"], base, eps)
    normed = rms(x, w["norm.weight"], eps)
    token_logits = normed @ w.get("output.weight", w["embeddings.weight"]).T
    token_loss = cross_entropy(token_logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    read = normed if c.get("norm_fastlayer_input") else x
    code_losses, code_logits = [], []
    for t in range(len(ids) - 1):
        if not first <= int(labels[t + 1]) < first + CODES:
            continue
        start = read[t]
        if "fast_project_in.weight" in w:
            start = w["fast_project_in.weight"] @ start + w["fast_project_in.bias"]
        frame = codes[:, t + 1]
        y = torch.cat([start[None], w["fast_embeddings.weight"][frame[:-1]]])
        for i in range(c["n_fast_layer"]):
            sizes = [c.get(f"fast_{n}", c[n]) for n in ("n_head", "n_local_heads", "head_dim")]
            y = layer(y, w, f"fast_layers.{i}", *sizes, base, eps)
        logits = rms(y, w["fast_norm.weight"], eps) @ w["fast_output.weight"].T
        code_logits.append(logits)
        code_losses.append(cross_entropy(logits, frame, reduction="sum"))
    return {
        "token_loss": token_loss,
        "code_loss": torch.stack(code_losses).sum(),
        "token_logits": token_logits,
        "code_logits": torch.stack(code_logits),
    }
