"""The kernels of answering, one token a sequence, on this machine, against formulas in fp64."""

from __future__ import annotations

import torch

from pronghorn.diagnostics.checks import Unsound
from pronghorn.diagnostics.compare import BROKEN, Comparison, close, device, draw, dtypes
from pronghorn.diagnostics.kernel_checks import EPS, said
from pronghorn.diagnostics.quantised_checks import four_bit_case
from pronghorn.kernels import matvec as rows_kernels
from pronghorn.kernels.bit_sums import RUN, Pieces, bit_sums, words_of
from pronghorn.kernels.cached_rope import rope_into_cache
from pronghorn.kernels.decode_attention import Heads, Paged, Rotation, decode_attention
from pronghorn.kernels.matvec import FourBit, RowNorm, RowShare
from pronghorn.kernels.next_token import Rows, embed_next, take_likeliest_
from pronghorn.kernels.walk import Adapters, Meeting, Product, Walk, fits_walk, walk

#: rows, width, outputs of each of two weights, rank of the adapters
ROWS, WIDTH, OUT, RANK = 3, 256, 96, 8
#: tokens of each context, the new one included, and the cache's blocks that hold it
LENGTHS, BLOCKS, BLOCK_TOKENS = (1, 70, 130), ((4,), (1, 5), (2, 0, 3)), 64


def few_rows() -> str:
    """A weight times one row with norm, bias, adapter and residual; gate and up with their activation; the products of
    several rows' adapters; and a row by codes of 4 bits."""
    compared = Comparison()
    slots = torch.tensor([1, 0, 2], dtype=torch.int32, device=device())
    for dtype in dtypes():
        x, scale = draw(ROWS, WIDTH, dtype=dtype), draw(WIDTH, dtype=dtype, seed=1)
        weights = [draw(OUT, WIDTH, dtype=dtype, seed=seed, scale=0.1) for seed in (2, 3)]
        a, b = (
            draw(3, *size, dtype=dtype, seed=n, scale=0.1)
            for n, size in ((4, (RANK, WIDTH)), (5, (OUT, RANK)))
        )
        bias, residual = draw(OUT, dtype=dtype, seed=6), draw(ROWS, OUT, dtype=dtype, seed=7)
        norm, wide = RowNorm(scale, EPS), x.double()
        normed = wide * (wide.square().mean(1, keepdim=True) + EPS).rsqrt() * scale.double()
        chosen = slots.long()
        xa = torch.einsum("bi,bji->bj", normed, a.double()[chosen]) * (chosen > 0)[:, None]
        share = torch.einsum("bj,boj->bo", xa, b.double()[chosen])
        both = normed @ torch.cat(weights).double().T
        found = rows_kernels.adapter_down(x, a, slots, norm)
        close(compared, "XA", found, xa, dtype)
        given, first = RowShare(found, b, slots, (OUT,)), RowShare(found[:1], b, slots[:1], (OUT,))
        y = rows_kernels.matvec(
            x[:1], weights[:1], norm=norm, bias=bias, share=first, residual=residual[:1].clone()
        )
        close(compared, "Y", y, both[:1, :OUT] + bias.double() + share[:1] + residual[:1].double())
        close(
            compared, "Y + LoRA", rows_kernels.adapter_up_(residual.clone(), given), residual.double() + share
        )
        act = rows_kernels.matvec(x[:1], weights, norm=norm, activation="silu")
        close(compared, "act", act, torch.nn.functional.silu(both[:1, :OUT]) * both[:1, OUT:])
    bits, truth = four_bit_case()
    x = draw(1, truth.shape[1], dtype=dtypes()[-1], seed=8)
    codes = FourBit(bits, tuple(bits.code.tolist()))
    close(compared, "4-bit Y", rows_kernels.matvec_4bit(x, [codes]), x.double() @ truth.T)
    return said(compared)


def between_attentions() -> str:
    """Output projection, MLP and the next layer's projections of one row with its adapter; in one launch where a GPU
    has a kernel for it, in bf16."""
    compared = Comparison()
    hidden, inner, outs = 1536, 1216, 264
    dtype = dtypes()[-1]

    def step(width: int, out: int, seed: int, normed: bool) -> Product:
        norm = RowNorm(draw(width, dtype=dtype, seed=seed + 1), EPS) if normed else None
        weight = draw(out, width, dtype=dtype, seed=seed, scale=width**-0.5)
        a = draw(2, 16, width, dtype=dtype, seed=seed + 20, scale=width**-0.5)
        b = draw(2, out, 16, dtype=dtype, seed=seed + 21, scale=0.25)
        adapter = Adapters(a, b, (out,))
        # Gate and up have a part each.
        if out == 2 * inner:
            adapter = Adapters(torch.cat([a, -a], 1), b, (inner, out))
        return Product(weight, draw(out, dtype=dtype, seed=seed + 2), norm, adapter)

    o, gate_up = step(hidden, hidden, 1, False), step(hidden, 2 * inner, 4, True)
    steps = Walk(o, gate_up, step(inner, hidden, 7, False), step(hidden, outs, 10, True), "silu")
    attended, x = draw(1, hidden, dtype=dtype, seed=13), draw(1, hidden, dtype=dtype, seed=14)
    summed = (x.double() + _applied(steps.o, attended)).to(dtype)
    gate, up = _applied(steps.gate_up, summed).chunk(2, 1)
    act = (torch.nn.functional.silu(gate) * up).to(dtype)
    summed = (summed.double() + _applied(steps.down, act)).to(dtype)
    meeting = Meeting.beside(torch.zeros(1, dtype=torch.int64, device=device()))
    slots = torch.tensor([1], dtype=torch.int32, device=device())
    y = walk(attended, x, steps, meeting, slots=slots, impl=None if fits_walk(steps) else "torch")
    close(compared, "x", x, summed)
    close(compared, "Y", y, _applied(steps.last, summed), dtype)
    if int(meeting.lost):
        raise Unsound(
            "programs of one launch waited for each other in vain",
            fix="end what else keeps the GPU's processors; decoding does without such launches where it has to",
        )
    return said(compared)


def _applied(step: Product, x: torch.Tensor) -> torch.Tensor:
    """norm(x) Wᵀ + bias + (norm(x) Aᵀ) Bᵀ of the adapter in slot 1, in fp64."""
    wide = x.double()
    if step.norm is not None:
        wide = wide * (wide.square().mean(1, keepdim=True) + EPS).rsqrt() * step.norm.weight.double()
    assert step.bias is not None and step.adapter is not None
    a, b, ends = step.adapter
    parts, rows = a[1].double().chunk(len(ends)), b[1].double().tensor_split(ends[:-1])
    share = torch.cat([wide @ part.T @ row.T for part, row in zip(parts, rows, strict=True)], 1)
    return wide @ step.weight.double().T + step.bias.double() + share


def between_steps() -> str:
    """The likeliest tokens of a step, where the next one and the host find them, and the next one's vectors."""
    compared = Comparison()
    on_gpu = device().type == "cuda"
    for dtype in dtypes():
        logits, weight = draw(ROWS, 3001, dtype=dtype), draw(3001, WIDTH, dtype=dtype, seed=1)
        tokens = torch.zeros(ROWS, dtype=torch.int64, device=device())
        state = torch.tensor([[3, 0, 9], [5, -1, 7], [1, 1, 1]], dtype=torch.int32, device=device())
        lost, told = (
            torch.zeros(1, dtype=torch.int64, device=device()),
            torch.zeros(2, 1 + ROWS, dtype=torch.int64),
        )
        told = told.pin_memory() if on_gpu else told
        take_likeliest_(logits, Rows(tokens, state[0], state[1], state[2], told, lost))
        if on_gpu:
            torch.cuda.synchronize()
        chosen, largest = tokens.tolist(), logits.double().cpu().max(1).values
        if told.tolist() != [[0] * (1 + ROWS), [0, *chosen]] or state.tolist() != [
            [4, 0, 10],
            [-1] * 3,
            [0] * 3,
        ]:
            raise Unsound("a step does not leave what the next one takes", fix=BROKEN)
        close(compared, "largest", logits[torch.arange(ROWS), chosen], largest.to(device()))
        given = torch.tensor([-1, 2, -1], dtype=torch.int32, device=device())
        close(compared, "x", embed_next(weight, tokens, given), weight[[chosen[0], 2, chosen[2]]].double())
    return said(compared)


def prompts_cache() -> str:
    """A prompt's q and k rotated, its keys and values in blocks of the cache, and nothing else changed there."""
    compared, tokens = Comparison(), 5
    heads = Heads(heads=4, kv_heads=2, head_dim=64, scale=64**-0.5)
    places = torch.tensor([70, 3, 129, 64, 0], device=device())
    angles = torch.arange(tokens)[:, None] * 10000.0 ** -(torch.arange(32) / 32)
    angles = torch.cat([angles, angles], 1).to(device())
    for dtype in dtypes():
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        qkv = draw(tokens, 8 * 64, dtype=dtype)
        cache = draw(3, BLOCK_TOKENS, 2, 2, 64, dtype=dtype, seed=1)
        by_head, expected = qkv.double().view(tokens, 8, 64), cache.double().flatten(0, 1)
        turned = by_head[:, :6] * cos.double()[:, None] + torch.cat(
            [-by_head[:, :6, 32:], by_head[:, :6, :32]], 2
        ) * sin.double()[:, None]  # fmt: skip
        expected[places] = torch.stack([turned[:, 4:], by_head[:, 6:]], 1)
        q, k, v = rope_into_cache(qkv.clone(), cos, sin, cache, places, heads)
        for name, found, wanted in (
            ("q", q, turned[:, :4]),
            ("k", k, turned[:, 4:]),
            ("v", v, by_head[:, 6:]),
        ):
            close(compared, name, found, wanted)
        close(compared, "cache", cache.flatten(0, 1), expected)
    return said(compared)


def written_weights() -> str:
    """Sums over the words of memory, by which weights that were written to are noticed: those of the formula, and
    others once one number has changed."""
    tensors = [draw(size, dtype=torch.float32, seed=seed) for seed, size in enumerate((70, 40_000))]
    words = [found for found in map(words_of, tensors) if found is not None]
    pieces = Pieces(words, [RUN, 4 * RUN])
    before = bit_sums(pieces).tolist()
    if before != bit_sums(pieces, impl="torch").tolist():
        raise Unsound("sums over memory are not those of the formula", fix=BROKEN)
    tensors[0][69] += 1.0
    changed = [one != other for one, other in zip(bit_sums(pieces).tolist(), before, strict=True)]
    if changed != [True] + [False] * (len(before) - 1):
        raise Unsound("a write to a weight is not noticed", fix=BROKEN)
    return f"{len(before)} pieces"


def paged_attention() -> str:
    """One new token of sequences whose keys and values lie in blocks, rotated and put there on the way."""
    compared = Comparison()
    heads = Heads(heads=4, kv_heads=2, head_dim=64, scale=64**-0.5)
    tables = torch.zeros(len(LENGTHS), max(map(len, BLOCKS)), dtype=torch.int32)
    for row, blocks in enumerate(BLOCKS):
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    angles = torch.arange(max(LENGTHS))[:, None] * 10000.0 ** -(torch.arange(32) / 32)
    angles = torch.cat([angles, angles], 1).to(device())
    for dtype in dtypes():
        rotation = Rotation(angles.cos().to(dtype), angles.sin().to(dtype))
        qkv = draw(len(LENGTHS), 8 * 64, dtype=dtype)
        cache = draw(6, BLOCK_TOKENS, 2, 2, 64, dtype=dtype, seed=1)
        expected = [
            _one(qkv[row], cache, blocks, LENGTHS[row], rotation) for row, blocks in enumerate(BLOCKS)
        ]
        paged = Paged(tables.to(device()), lengths.to(device()), tuple(zip(BLOCKS, LENGTHS, strict=True)))
        out = decode_attention(qkv.clone(), cache, paged, heads, rotation)
        close(compared, "out", out, torch.stack([found for found, _, _ in expected]))
        for row, (_, key, value) in enumerate(expected):
            last = LENGTHS[row] - 1
            stored = cache[BLOCKS[row][last // BLOCK_TOKENS], last % BLOCK_TOKENS]
            close(compared, "cache", stored, torch.stack([key, value]))
    return said(compared)


def _one(
    qkv: torch.Tensor, cache: torch.Tensor, blocks: tuple[int, ...], length: int, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output [N·D], the new key and value [K, D]) of one sequence in fp64."""
    by_head = qkv.double().view(8, 64)
    cos, sin = rotation.cos[length - 1].double(), rotation.sin[length - 1].double()
    turned = by_head[:6] * cos + torch.cat([-by_head[:6, 32:], by_head[:6, :32]], 1) * sin
    q, key, value = turned[:4], turned[4:], by_head[6:]
    context = cache[list(blocks)].flatten(0, 1)[: length - 1].double()
    k = torch.cat([context[:, 0], key[None]]).repeat_interleave(2, 1)
    v = torch.cat([context[:, 1], value[None]]).repeat_interleave(2, 1)
    weights = (torch.einsum("nd,lnd->nl", q, k) / 8).softmax(-1)
    return torch.einsum("nl,lnd->nd", weights, v).flatten(), key, value
