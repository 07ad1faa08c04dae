"""A low-rank adapter that begins by making up for what quantisation lost (LoftQ: Li et al. 2023, arXiv 2310.08659).

Where W is the original weight, Q the quantised one and s the adapter's scaling, B A is the best rank-r part of what is
missing, R = W − Q:

    min ‖R − s B A‖                  the truncated SVD of R
    min ‖(R − s B A) L‖, L Lᵀ = M    with the second moments M of what the module reads: the least output error;
                                     R L = U Σ Vᵀ,  s B A = U_r Σ_r V_rᵀ L⁻¹

The quantised weights stay as they are, so that the adapter belongs to the base that was loaded and to no other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.engine import base_causal_lm, evaluating
from pronghorn.quantising.layers import Decoder, Moments, decoder_layers, stock_forwards
from pronghorn.quantising.measure import Errors, errors_of
from pronghorn.quantising.parts import LinearPart, watching
from pronghorn.quantising.rounding import damping
from pronghorn.weights import is_four_bit, read_weight

logger = logging.getLogger("pronghorn")

#: (full name of a linear module, a row of its second moments [in, in] or None) as they become known
MomentsOf = Iterator[tuple[str, Tensor | None]]


@dataclass(frozen=True)
class Compensated:
    """An adapted module: errors of the quantised weight alone, and with the adapter."""

    name: str
    rank: int
    before: Errors
    after: Errors


@dataclass(frozen=True)
class CompensationReport:
    """All adapted modules that are quantised; `weighted` where output errors were minimised."""

    modules: Sequence[Compensated]
    weighted: bool

    def __str__(self) -> str:
        kind = "output" if self.weighted else "weight"
        before, after = (
            sum(getattr(errors, kind) for errors in found) / max(len(self.modules), 1)
            for found in ([m.before for m in self.modules], [m.after for m in self.modules])
        )
        return f"{len(self.modules)} adapters make up for quantisation: mean {kind} error {before:.2e} → {after:.2e}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"weighted": self.weighted, "modules": [asdict(module) for module in self.modules]}


def low_rank(residual: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B [out, r], A [r, in]) fp32 of the best B A for a residual [out, in], with rows of equal norms in both.

    Args:
        moment: M [in, in]; None takes every input as worth the same.
    """
    root = None
    if moment is not None:
        root = torch.linalg.cholesky(moment + damping(moment) * torch.eye(len(moment), device=moment.device))
        residual = residual @ root
    left, values, right = _leading(residual, rank)
    scale = values.sqrt()
    b, a = left * scale, right * scale[:, None]
    if root is not None:
        a = torch.linalg.solve_triangular(root, a, upper=False, left=False)
    return b, a


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values, by the smaller Gram matrix's eigenvectors; zeros beyond its size."""
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = _leading(matrix.t(), rank)
        return left.t(), values, right.t()
    _, vectors = torch.linalg.eigh(matrix @ matrix.t())
    left = vectors[:, -rank:].flip(1)
    right = left.t() @ matrix
    values = right.norm(dim=1)
    right = right / values.clamp_min(torch.finfo(values.dtype).tiny)[:, None]
    missing = rank - left.shape[1]
    if missing > 0:
        pad = torch.nn.functional.pad
        left, values, right = (
            pad(left, (0, missing)),
            pad(values, (0, missing)),
            pad(right, (0, 0, 0, missing)),
        )
    return left, values, right


@torch.no_grad()
def compensate(
    model: Any, original: Callable[[str], Tensor], ids: Tensor | None = None, adapter: str = "default"
) -> CompensationReport:
    """Set the adapter of every quantised linear module of a PEFT model to what quantisation lost there.

    Modules in 16 bits keep the usual beginning. Memory holds one original weight at a time.

    Args:
        original: the name of a module in the model without PEFT -> its original weight [out, in].
        ids: calibration rows [R, S] to weigh errors by what modules read; None weighs none.
    """
    base = base_causal_lm(model)
    adapted = dict(_adapted(base, adapter))
    found = []
    moments = ((name, None) for name in adapted) if ids is None else _moments(model, adapted, ids)
    for name, moment in moments:
        found.append(_compensate_module(adapted[name], name, original(name), moment, adapter))
    report = CompensationReport(found, ids is not None)
    logger.info("pronghorn: %s", report)
    return report


def _compensate_module(
    module: Any, name: str, original: Tensor, moment: Tensor | None, adapter: str
) -> Compensated:
    weight = read_weight(module.base_layer)
    assert weight is not None
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    scaling = float(module.scaling[adapter])
    held = weight.dense(torch.float32)
    wanted = original.to(held.device, torch.float32)
    made_b, made_a = low_rank(wanted - held, a.shape[0], moment)
    b.copy_(made_b / scaling)
    a.copy_(made_a)
    by = torch.eye(wanted.shape[1], device=held.device) if moment is None else moment
    with_adapter = held + scaling * (b.float() @ a.float())
    return Compensated(name, a.shape[0], errors_of(wanted, held, by), errors_of(wanted, with_adapter, by))


def _adapted(base: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """Quantised linear modules with a LoRA pair, by their names without PEFT."""
    for name, module in base.named_modules():
        if adapter in getattr(module, "lora_A", {}) and is_four_bit(module.base_layer):
            yield name, module


def _moments(model: Any, adapted: Mapping[str, Any], ids: Tensor) -> MomentsOf:
    """Second moments of what adapted modules read in the quantised model, a layer after the other."""
    base = base_causal_lm(model)
    layers = decoder_layers(base, "init_lora_weights='loftq'")
    prefix = next(name for name, module in base.named_modules() if module is layers)
    seen = set()
    with evaluating(model), model.disable_adapter(), stock_forwards(base):
        decoder = Decoder(base, ids)
        hidden = decoder.inputs()
        for index in range(len(layers)):
            start = f"{prefix}.{index}."
            here = {name: module.base_layer for name, module in adapted.items() if name.startswith(start)}
            moments = Moments()
            with watching({name: LinearPart(module) for name, module in here.items()}, moments.note):
                hidden = [decoder.run(index, chunk) for chunk in hidden]
            for names, moment in moments.groups():
                for name in names:
                    seen.add(name)
                    yield name, moment
    yield from ((name, None) for name in adapted if name not in seen)  # outside the layers, such as the head
