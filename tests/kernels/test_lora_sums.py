"""Sums of partial results, of which some rows or columns have fewer."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.tiles import Sums, why_not
from pronghorn.kernels.triton.lora_sums import Partials, sum_a_grads, sum_output_grads, sum_rows


def partial(pieces: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(pieces, rows, columns, generator=generator).to(device)


@pytest.mark.parametrize("pieces", [5, 70])
@pytest.mark.parametrize("first,until", [(None, 0), (3, 128), (3, 4096), (0, 0)])
def test_rows(pieces: int, first: int | None, until: int, device: torch.device) -> None:
    given = partial(pieces, 200, 16, device)
    out = torch.full((200, 16), float("nan"), device=device)
    until = min(until, 200)
    given[3:, :until] = float("nan")  # nobody wrote these
    sum_rows(given, out, *(() if first is None else (Sums(first, pieces, until),)))
    torch.testing.assert_close(out[:until], given[:3, :until].sum(0))
    torch.testing.assert_close(out[until:], given[:, until:].sum(0))


def test_the_rest_may_have_fewer_sums(device: torch.device) -> None:
    given = partial(7, 200, 16, device)
    given[2:, 128:] = float("nan")
    out = torch.full((200, 16), float("nan"), device=device)
    sum_rows(given, out, Sums(7, 2, 128))
    torch.testing.assert_close(out[:128], given[:, :128].sum(0))
    torch.testing.assert_close(out[128:], given[:2, 128:].sum(0))


@pytest.mark.parametrize("pieces", [5, 70])
@pytest.mark.parametrize("first,until", [(None, 0), (2, 256), (2, 3072), (0, 0)])
def test_gradients_of_a(pieces: int, first: int | None, until: int, device: torch.device) -> None:
    given = partial(pieces, 8, 600, device)
    until = min(until, 600)
    given[2:, :, :until] = float("nan")
    grad = torch.ones(8, 600, device=device)
    sum_a_grads(given, grad, *(() if first is None else (Sums(first, pieces, until),)))
    torch.testing.assert_close(grad[:, :until], 1 + given[:2, :, :until].sum(0))
    torch.testing.assert_close(grad[:, until:], 1 + given[:, :, until:].sum(0))


def dealt(tiles: int, each: int, blocks: int) -> list[int]:
    """Programs of each block by going through all tiles one by one."""
    programs = [
        {unit // each for unit in range(block * tiles, (block + 1) * tiles)} for block in range(blocks)
    ]
    return [len(found) for found in programs]


@pytest.mark.parametrize("tokens,blocks,most", [(8192, 56, 132), (8192, 12, 132), (640, 5, 7), (100, 3, 64)])
def test_tiles_are_dealt_out_to_all(tokens: int, blocks: int, most: int) -> None:
    from pronghorn.kernels.triton.lora_hopper import shares_of

    shares = shares_of(tokens, blocks, most)
    assert shares.programs <= most
    assert (shares.programs - 1) * shares.each < shares.tiles * blocks <= shares.programs * shares.each
    assert shares.pieces(blocks) == max(dealt(shares.tiles, shares.each, blocks))


@pytest.mark.parametrize("start", [False, True], ids=["", "with dXA A"])
@pytest.mark.parametrize("each", [3, 4, 7, 30])
def test_blocks_have_as_many_sums_of_b_as_programs(each: int, start: bool, device: torch.device) -> None:
    """Sums that no program wrote are not read."""
    tiles, wide, tokens, widths, ranks = 10, 64, 40, (150, 64), (16, 8)
    blocks = (3, 1)
    counts = dealt(tiles, each, sum(blocks))
    dxa = partial(sum(blocks), tokens, 16, device)
    db = partial(max(counts), sum(widths), 16, device)
    want = []
    for part, (width, first) in enumerate(zip(widths, (0, blocks[0]), strict=True)):
        at = db[:, sum(widths[:part]) :][:, :width]
        for block in range(blocks[part]):
            at[counts[first + block] :, block * wide : (block + 1) * wide] = float("nan")
        want.append(at.nan_to_num(0.0).sum(0)[:, : ranks[part]])
    partials = Partials(dxa, db, ranks, widths, blocks, tiles, each, wide)
    out = torch.empty(tokens, sum(ranks), device=device)
    grads = [torch.ones(width, rank, device=device) for width, rank in zip(widths, ranks, strict=True)]
    a = partial(1, sum(ranks), 130, device)[0]
    given = torch.empty(tokens, 130, device=device)
    sum_output_grads(partials, out, grads, [1.0, 2.0], *((a, given) if start else ()))
    for grad, expected, scaling in zip(grads, want, (1.0, 2.0), strict=True):
        torch.testing.assert_close(grad, 1 + scaling * expected)
    torch.testing.assert_close(out[:, :16], dxa[:3].sum(0))
    torch.testing.assert_close(out[:, 16:], 2 * dxa[3:, :, :8].sum(0))
    if start:
        torch.testing.assert_close(given, out @ a, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize("need_b", [True, False])
@pytest.mark.parametrize("tokens,widths", [(1000, (1000, 520, 264)), (64, (72,)), (4100, (4096, 1536))])
def test_gradients_by_the_copy_engine(
    tokens: int, widths: tuple[int, ...], need_b: bool, rank: int, device: torch.device
) -> None:
    if why_not(device, torch.bfloat16) is not None:
        pytest.skip("the kernel runs on Hopper GPUs")
    from pronghorn.kernels.triton.lora_hopper import output_grads, suits

    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(device, torch.bfloat16)

    dys = random(tokens, sum(widths)).split(widths, 1)
    bs, xa = [random(width, rank) for width in widths], random(tokens, rank * len(widths))
    assert not suits(dys, bs, xa[:, 1:])  # rows that begin anywhere
    partials = output_grads(dys, bs, xa.split(rank, 1), need_b)
    dxa = torch.empty(tokens, rank * len(widths), device=device)
    grads = [torch.ones(width, rank, device=device) for width in widths]
    sum_output_grads(partials, dxa, grads if need_b else (), [0.5] * len(widths))
    for dy, b, part, left, grad in zip(dys, bs, dxa.split(rank, 1), xa.split(rank, 1), grads, strict=True):
        torch.testing.assert_close(part, 0.5 * dy.float() @ b.float(), atol=1e-2, rtol=1e-4)
        if need_b:
            torch.testing.assert_close(grad, 1 + 0.5 * dy.float().t() @ left.float(), atol=1e-2, rtol=1e-4)
