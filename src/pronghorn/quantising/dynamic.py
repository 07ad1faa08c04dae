"""Dynamic quantisation of a loaded 16-bit model: measure every part (linear layers, stacks of experts), choose its
form, round it to fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.errors import QuantisationRefused
from pronghorn.quantising.calibration import CalibrationRows
from pronghorn.quantising.choice import Option, choose
from pronghorn.quantising.formats import Format, Stored, dense_form, plain_form
from pronghorn.quantising.held_out import HeldOut
from pronghorn.quantising.layers import Decoder, Moments, decoder_layers
from pronghorn.quantising.measure import Errors, Measured, errors_of, measure, weigh
from pronghorn.quantising.parts import Part, parts_of, watching
from pronghorn.quantising.report import ModuleReport, Report
from pronghorn.quantising.rounding import OutputFit, round_plain
from pronghorn.quantising.settings import DynamicQuantisation
from pronghorn.quantising.store import mark_quantised

logger = logging.getLogger("pronghorn")


def quantise(
    model: Any,
    rows: CalibrationRows,
    settings: DynamicQuantisation,
    *,
    double: bool = True,
    device: torch.device | None = None,
) -> Report:
    """Bring the parts of a model's decoder layers into 4 bits, those that bear it least into more.

    The model's weights are read in 16 bits where they lie. Besides them there is one layer at a time on `device`, and
    what has been quantised already.

    Args:
        double: with double quantisation.
        device: where layers run and the model lies afterwards; None leaves everything where it is.

    Raises:
        QuantisationRefused: for a model without plain linear layers.
    """
    started = time.monotonic()
    model.requires_grad_(False)
    model.eval()
    names = _layer_names(model)
    plain = plain_form(double)
    decoder = Decoder(model, rows.ids, device=device)
    measured, kept = measure(decoder, names, double)
    if not measured:
        raise QuantisationRefused(
            f"{type(model).__name__} has no plain linear layers to quantise",
            fix="load it without dynamic_4bit",
        )
    weigh(decoder, names, measured, kept)
    chosen = _choose(measured, settings, plain, dense_form(model.dtype))
    logger.info("pronghorn: measured %d modules in %.0f s", len(measured), time.monotonic() - started)
    held_out = None if rows.held_out is None else HeldOut(Decoder(model, rows.held_out, device=device))
    found = _round(decoder, names, measured, chosen, plain, held_out)
    if device is not None:
        model.to(device)
    dense = [name for name, form in chosen.items() if form.dense]
    mark_quantised(model, [*dense, *_other_linear(model)], model.dtype, double)
    predictions = None if held_out is None else held_out.compare()
    report = Report(found, plain, rows.ids.numel(), predictions, time.monotonic() - started)
    model.__dict__["pronghorn_quantisation"] = report
    logger.info("pronghorn: %s", report)
    return report


def _choose(
    measured: Sequence[Measured], settings: DynamicQuantisation, plain: Format, dense: Format
) -> dict[str, Format]:
    """The form of every module, by name."""
    base = sum(plain.nbytes(module.shape) for module in measured)
    forms = [[*module.harm, dense] for module in measured]
    options = [
        [Option(form.nbytes(module.shape), module.harm.get(form, 0.0)) for form in own]
        for module, own in zip(measured, forms, strict=True)
    ]
    indices = choose(options, base + settings.extra_bytes(base))
    assert indices is not None  # the smallest forms take no more than `base`
    return {module.name: own[i] for module, own, i in zip(measured, forms, indices, strict=True)}


@torch.no_grad()
def _round(
    decoder: Decoder,
    layer_names: Sequence[str],
    measured: Sequence[Measured],
    chosen: dict[str, Format],
    plain: Format,
    held_out: HeldOut | None,
) -> list[ModuleReport]:
    """Put the modules into their forms, a layer after the other; each is fitted to what it reads once those before it
    are quantised."""
    harm = {module.name: module.harm[plain] for module in measured}
    found: list[ModuleReport] = []
    hidden = decoder.inputs()
    for index, prefix in enumerate(layer_names):
        if decoder.device is not None:
            decoder.layers[index].to(decoder.device)  # where it stays
        parts, moments = parts_of(decoder.layers[index]), Moments()
        with watching(parts, moments.note):
            for chunk in hidden:
                decoder.run(index, chunk)
        rounded = _round_layer(
            index, parts, {p: chosen[f"{prefix}.{p}"] for p in parts}, moments, plain, held_out
        )
        hidden = [decoder.run(index, chunk) for chunk in hidden]
        found += [_reported(f"{prefix}.{one.path}", one, chosen, harm) for one in rounded]
        _store(decoder.layers[index], rounded)
    return found


def _round_layer(
    index: int,
    parts: dict[str, Part],
    forms: dict[str, Format],
    moments: Moments,
    plain: Format,
    held_out: HeldOut | None,
) -> list[_Rounded]:
    """The parts of a layer, which then hold the values of their forms, still in the compute dtype."""
    rounded: list[_Rounded] = []
    for paths, moment in moments.groups():
        rounded += _round_group(parts, {path: forms[path] for path in paths}, moment, plain)
    if held_out is not None:
        held_out.run("exact", index)
        for one in rounded:
            one.part.copy_(one.plain)
        held_out.run("plain", index)
    for one in rounded:
        one.part.copy_(one.fitted)
    if held_out is not None:
        held_out.run("fitted", index)
    return rounded


def _reported(
    name: str, rounded: _Rounded, chosen: dict[str, Format], harm: dict[str, float]
) -> ModuleReport:
    rows, columns = rounded.part.weight.shape
    return ModuleReport(name, (rows, columns), chosen[name], harm[name], rounded.before, rounded.after)


def _store(layer: nn.Module, rounded: list[_Rounded]) -> None:
    """Hold in 4 bits what has them now, as bitsandbytes does, and let go of all else."""
    while rounded:
        one = rounded.pop()
        if one.stored is not None:
            one.part.store(layer, one.path, one.stored)


@dataclass(frozen=True)
class _Rounded:
    """A part of a layer and what it could hold, in the compute dtype: plain NF4, and what its form gives. `stored` is
    None for one that stays as it is."""

    path: str
    part: Part
    plain: Tensor
    fitted: Tensor
    stored: Stored | None
    before: Errors
    after: Errors


def _round_group(
    parts: dict[str, Part], forms: dict[str, Format], moment: Tensor, plain: Format
) -> list[_Rounded]:
    """Parts that read the same; their weights stay as they are.

    Args:
        forms: by the path of each part of the group.
        moment: second moments [in, in] of what they read.
    """
    weights = {path: parts[path].weight.float() for path in forms}
    few = [path for path, form in forms.items() if not form.dense]
    fitted = (
        OutputFit(moment).round([weights[path] for path in few], [forms[path] for path in few]) if few else []
    )
    stored = dict(zip(few, fitted, strict=True))
    found = []
    for path, weight in weights.items():
        part, held = parts[path], stored.get(path)
        nearest = round_plain(weight, plain).dense()
        dense = weight if held is None else held.dense()
        before, after = errors_of(weight, nearest, moment), errors_of(weight, dense, moment)
        dtype = part.weight.dtype
        found.append(_Rounded(path, part, nearest.to(dtype), dense.to(dtype, copy=True), held, before, after))
    return found


def _layer_names(model: Any) -> list[str]:
    layers = decoder_layers(model)
    found = next(name for name, module in model.named_modules() if module is layers)
    return [f"{found}.{index}" for index in range(len(layers))]


def _other_linear(model: nn.Module) -> list[str]:
    """Plain linear modules outside the decoder layers, such as the head: Transformers is told to leave them alone."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside
    ]
