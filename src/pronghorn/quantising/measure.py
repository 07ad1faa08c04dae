"""What 4 bits do to each part of a model (`parts`): to its weight, to its output, and to what the model predicts.

With E = W − Q, A = XᵀX / T of what the module reads and g the gradient of the model's log likelihood in its output:

    weight error    ‖E‖² / ‖W‖²
    output error    tr(E A Eᵀ) / tr(W A Wᵀ)
    harm            ½ Σ_i G_i · (E A Eᵀ)_ii,   G_i = mean over tokens of g_i²

The last is the second-order estimate of KL(model ‖ quantised), in nats a token, with errors of different outputs taken
as independent (the diagonal of the Fisher information, for tokens that the model itself draws). It makes errors in
different modules comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from pronghorn.quantising.formats import Format, forms_of
from pronghorn.quantising.layers import Decoder, Moments
from pronghorn.quantising.parts import parts_of, watching
from pronghorn.quantising.rounding import round_plain

#: calibration tokens that gradients are taken of: they need a pass back, and their layers' inputs wait on the host
GRADIENT_TOKENS = 2048


@dataclass(frozen=True)
class Errors:
    """Relative squared errors of a part's weight and of its output."""

    weight: float
    output: float


@dataclass
class Measured:
    """A part before it is quantised.

    Args:
        row_errors: for each form (E A Eᵀ)_ii [out] on the CPU, of plain rounding.
        harm: for each form; filled by `weigh`.
    """

    name: str
    shape: tuple[int, int]
    row_errors: dict[Format, Tensor]
    harm: dict[Format, float]


def row_errors(error: Tensor, moment: Tensor) -> Tensor:
    """(E A Eᵀ)_ii of E [out, in] fp32: the mean square that each output is off by."""
    return (error @ moment).mul_(error).sum(1).clamp_min_(0.0)


def errors_of(weight: Tensor, quantised: Tensor, moment: Tensor) -> Errors:
    """Errors of a weight [out, in] and what stands for it, both fp32."""
    off = weight - quantised
    size, energy = float(weight.square().sum()), float(row_errors(weight, moment).sum())
    return Errors(
        float(off.square().sum()) / size if size else 0.0,
        float(row_errors(off, moment).sum()) / energy if energy else 0.0,
    )


@torch.no_grad()
def measure(
    decoder: Decoder, layer_names: Sequence[str], double: bool
) -> tuple[list[Measured], list[Tensor]]:
    """Every part of the decoder's layers in its forms of 4 bits, in the unquantised model; `harm` stays empty. And what
    `weigh` takes gradients of: a part of each layer's input and of the last one's output, on the CPU.

    Args:
        layer_names: full names of the layers.
        double: with double quantisation.
    """
    found = []
    hidden = decoder.inputs()
    kept = [_first_rows(hidden, _gradient_rows(decoder))]
    for index, layer in enumerate(decoder.layers):
        with decoder.placed(index):
            parts, moments = parts_of(layer), Moments()
            with watching(parts, moments.note):
                hidden = [decoder.run(index, chunk) for chunk in hidden]
            for paths, moment in moments.groups():
                for path in paths:
                    weight = parts[path].weight.float()
                    rows = {
                        form: row_errors(weight - round_plain(weight, form).dense(), moment).cpu()
                        for form in forms_of(weight.shape[1], double)
                    }
                    shape = (weight.shape[0], weight.shape[1])
                    found.append(Measured(f"{layer_names[index]}.{path}", shape, rows, {}))
        kept.append(_first_rows(hidden, len(kept[0])))
    return found, kept


def _gradient_rows(decoder: Decoder) -> int:
    return max(1, GRADIENT_TOKENS // decoder.ids.shape[1])


def _first_rows(chunks: Sequence[Tensor], count: int) -> Tensor:
    """Of hidden states [rows, S, H] in chunks, on the CPU."""
    return torch.cat(
        [row.cpu() for row in islice((row for chunk in chunks for row in chunk.split(1)), count)]
    )


def weigh(
    decoder: Decoder, layer_names: Sequence[str], measured: Sequence[Measured], kept: list[Tensor]
) -> None:
    """Fill in `harm`, by one pass back over a part of the calibration rows, whose hidden states `measure` has kept."""
    squares = _gradient_squares(decoder, layer_names, kept)
    for module in measured:
        weights = squares[module.name]
        module.harm = {form: 0.5 * float((rows * weights).sum()) for form, rows in module.row_errors.items()}


def _gradient_squares(decoder: Decoder, layer_names: Sequence[str], kept: list[Tensor]) -> dict[str, Tensor]:
    """G [out] of every part, on the CPU; lets go of `kept`."""
    output = kept.pop()
    # A row at a time: logits in fp32 are the largest tensor there is.
    part = Decoder(decoder.model, decoder.ids[: len(output)], decoder.ids.shape[1], decoder.device)
    place = part.inputs()[0].device
    gradients = [
        _gradient_of_likelihood(part, ids, given.to(place))
        for ids, given in zip(part.chunks, output.split(1), strict=True)
    ]
    found: dict[str, Tensor] = {}
    for index in range(len(part.layers) - 1, -1, -1):
        with part.placed(index):
            parts = parts_of(part.layers[index])
            squares = _Squares({path: len(own.weight) for path, own in parts.items()})
            for row, given in enumerate(kept.pop().split(1)):
                leaf = given.detach().to(place).requires_grad_()
                with watching(parts, squares.note):
                    output = part.run(index, leaf)
                output.backward(gradients[row])
                assert leaf.grad is not None
                gradients[row] = leaf.grad
        for path, total in squares.sums.items():
            found[f"{layer_names[index]}.{path}"] = total / part.ids.numel()
    return found


def _gradient_of_likelihood(decoder: Decoder, ids: Tensor, hidden: Tensor) -> Tensor:
    """d Σ_t log p(y_t) / d hidden, where the model itself draws each y_t."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = decoder.logits(ids, leaf).float().log_softmax(-1)
        drawn = _draw(logits.detach().flatten(0, 1))
        logits.flatten(0, 1).gather(1, drawn[:, None]).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def _draw(log_probabilities: Tensor) -> Tensor:
    """A token from each row, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    thresholds = torch.rand(len(log_probabilities), 1, generator=generator).to(log_probabilities.device)
    reached = log_probabilities.exp().cumsum(-1)
    return torch.searchsorted(reached, thresholds * reached[:, -1:]).squeeze(1)


class _Squares:
    """Σ g² [out] of the gradients g of what parts give, on the CPU; zeros of a part that nothing goes through."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sums = {path: torch.zeros(size) for path, size in sizes.items()}

    def note(self, path: str, given: Tensor, output: Tensor, expert: int) -> None:
        """Take the gradient of an output in, once it is there."""
        rows = slice(expert * output.shape[-1], (expert + 1) * output.shape[-1])

        def on_gradient(gradient: Tensor) -> None:
            self.sums[path][rows] += gradient.detach().float().flatten(0, -2).square().sum(0).cpu()

        output.register_hook(on_gradient)
