"""Weights onto NF4's grid so that their module's output changes least, at no cost in bytes.

With X [T, in] what a module reads, A = XᵀX / T, and E = W − Q:

    output error   ‖X Eᵀ‖² / T = tr(E A Eᵀ)

Rounding each weight to the nearest value minimises ‖E‖² instead. Here the scale of each block is searched for, and
the columns are rounded one after the other, the largest of A's diagonal first, each time moving the columns that are
left so that they make up for the error so far (Frantar et al. 2022, arXiv 2210.17323):

    e = (w_j − q_j) / U_jj,   w_k ← w_k − e U_jk  for k > j,   UᵀU = (A + λI)⁻¹,  U upper triangular

Scales stay fixed meanwhile, so that columns may come in any order and blocks may be what bitsandbytes' are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pronghorn.quantising.formats import Format, Scales, Stored, nearest, nf4_values, spread, store_scales

#: λ as a share of A's mean diagonal: without it what never occurred in calibration would cost nothing
DAMPING = 0.01
#: factors of a block's largest weight that are tried as its scale
_FACTORS = (0.80, 0.84, 0.88, 0.92, 0.96, 1.0, 1.04)
#: columns whose corrections are applied to the rest in one product
_COLUMNS = 64
#: weights that are rounded together; a mixture's stack has many times as many
_AT_ONCE = 1 << 26


def round_plain(weight: Tensor, form: Format) -> Stored:
    """As bitsandbytes does it: the largest weight of a block is its scale, each weight goes to the nearest value."""
    return _nearest(weight, store_scales(_largest(weight, form.blocksize), form), form)


class OutputFit:
    """Rounds weights [out, in] of modules that read the same, so that their outputs change little.

    Args:
        moment: A [in, in] fp32.
    """

    def __init__(self, moment: Tensor) -> None:
        self.width = len(moment)
        self.importance = moment.diagonal()
        self.order = self.importance.argsort(descending=True)
        self.factor = inverse_factor(moment[self.order][:, self.order])

    def round(self, weights: Sequence[Tensor], forms: Sequence[Format]) -> list[Stored]:
        """Weights (fp32) on the grids of their forms."""
        scales = [
            store_scales(search_scales(weight, self.importance, form.blocksize), form)
            for weight, form in zip(weights, forms, strict=True)
        ]
        return self.round_with(weights, scales, forms)

    def round_with(
        self, weights: Sequence[Tensor], scales: Sequence[Scales], forms: Sequence[Format]
    ) -> list[Stored]:
        """The same for given scales."""
        sizes = [len(weight) for weight in weights]
        each = torch.cat(
            [
                spread(own.values, (size, self.width), form.blocksize)
                for own, form, size in zip(scales, forms, sizes, strict=True)
            ]
        )
        rows = max(1, _AT_ONCE // self.width)
        pieces = zip(torch.cat(list(weights)).split(rows), each.split(rows), strict=True)
        indices = torch.cat([self._round_rows(weight, scale) for weight, scale in pieces])
        return [
            Stored(own.contiguous(), scale, form)
            for own, scale, form in zip(indices.split(sizes), scales, forms, strict=True)
        ]

    def _round_rows(self, weight: Tensor, each: Tensor) -> Tensor:
        """Indices uint8 [rows, in] of weights with a scale each."""
        # Columns as rows, [in, Σ out], in their order: all weights take each step together.
        left = weight[:, self.order].t().contiguous()
        each = torch.where(each == 0, 1.0, each)[:, self.order].t().contiguous()
        found = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
        for start in range(0, self.width, _COLUMNS):
            part = slice(start, min(start + _COLUMNS, self.width))
            rest = slice(part.stop, self.width)
            errors = self._round_columns(left, each, found, part)
            left[rest].addmm_(self.factor[part, rest].t(), errors, alpha=-1)
        return torch.empty_like(found).index_copy_(0, self.order, found).t()

    def _round_columns(self, left: Tensor, each: Tensor, found: Tensor, part: slice) -> Tensor:
        """Round some columns one after the other, into `found`; returns their errors e [columns, out]."""
        values, factor = nf4_values(left.device), self.factor
        diagonal = factor.diagonal()[part].tolist()  # numbers: one wait for the device, not one a column
        errors = torch.empty_like(left[part])
        for row, j in enumerate(range(part.start, part.stop)):
            index = nearest(left[j] / each[j])
            found[j] = index
            errors[row] = (left[j] - values[index] * each[j]) / diagonal[row]
            later = slice(j + 1, part.stop)
            left[later].addr_(factor[j, later], errors[row], alpha=-1)
        return errors


def search_scales(weight: Tensor, importance: Tensor, blocksize: int) -> Tensor:
    """For each block the scale, among some around its largest weight, of the least Σ importance · (w − q)².

    Args:
        importance: of each column, fp32 [in].
    """
    largest = _largest(weight, blocksize)
    blocks = _blocks(weight, blocksize)
    heavy = _blocks(importance.expand_as(weight), blocksize)
    values = nf4_values(weight.device)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for factor in _FACTORS:
        scale = (largest * factor).clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        off = values[nearest(blocks / scale)].mul_(scale).sub_(blocks).square_().mul_(heavy).sum(1)
        better = off < least
        best, least = torch.where(better, scale.squeeze(1), best), torch.where(better, off, least)
    return best


def inverse_factor(moment: Tensor) -> Tensor:
    """U, upper triangular with UᵀU = (A + λI)⁻¹."""
    damped = moment + torch.eye(len(moment), device=moment.device) * damping(moment)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def damping(moment: Tensor) -> float:
    """λ; 1 where nothing ever came in."""
    return DAMPING * float(moment.diagonal().mean()) or 1.0


def _nearest(weight: Tensor, scales: Scales, form: Format) -> Stored:
    each = spread(scales.values, (weight.shape[0], weight.shape[1]), form.blocksize)
    return Stored(nearest(weight / torch.where(each == 0, 1.0, each)).to(torch.uint8), scales, form)


def _blocks(weight: Tensor, blocksize: int) -> Tensor:
    """[blocks, blocksize], zeros after the end."""
    flat = weight.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)


def _largest(weight: Tensor, blocksize: int) -> Tensor:
    return _blocks(weight, blocksize).abs().amax(1)
