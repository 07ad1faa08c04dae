"""Linear layers of a loaded model to int8: which of them, and one group after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pronghorn.errors import Int8Unavailable, UnknownArgument
from pronghorn.families import family_of
from pronghorn.hardware import Hardware
from pronghorn.loading.arguments import check_eight_bit, tell_eight_bit
from pronghorn.loading.fp8 import save_dequantised
from pronghorn.quantising.layers import decoder_layers
from pronghorn.weights import Int8Linear
from pronghorn.weights.four_bit import add_int8_products, fits_int8_products
from pronghorn.weights.int8_linear import fits_int8

logger = logging.getLogger("pronghorn")


#: what stays in 16-bit products over 4 bits unless it is asked for. On SmolLM2-135M in NF4 the cosine of adapter
#: gradients to fp32 on the NF4 weights is (median, worst) 0.9889, 0.9532 with them in int8 and 0.9920, 0.9790 without,
#: wanted 0.99, 0.97 (benchmarks.gates --mode nf4-int8). The unquantised model bears it: 0.9956, 0.9779.
#: Latent attention's were not measured; all of them are left out.
QUERIES_AND_KEYS = ("q_proj", "k_proj", "qkv_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


@dataclass(frozen=True)
class Int8Options:
    """Which layers are multiplied in int8, stored so or in 4 bits.

    Attributes:
        skip_layers: decoder layers at either end that stay as they are.
        modules: last parts of names of the modules to choose; None for all linear ones of the decoder layers, over 4
            bits without `QUERIES_AND_KEYS`.
        copies: 2 stores codes for either direction; 1 half of that, and the input gradient turns the others round.
            4-bit modules store neither and make them for each product.
    """

    skip_layers: int = 0
    modules: tuple[str, ...] | None = None
    copies: int = 2


def choose_int8(
    load_in_int8: bool,
    hardware: Hardware,
    *,
    bits: int,
    fp8: bool | str,
    full_finetuning: bool,
    skip_layers: int,
    modules: Iterable[str] | None,
    copies: int,
) -> Int8Options | None:
    """The options that the arguments of `from_pretrained` stand for; None without int8.

    Raises:
        UnknownArgument: for values that do not exist or do not go together.
        Int8Unavailable: on a GPU that cannot multiply int8.
    """
    if not load_in_int8:
        return None
    if load_in_int8 is not True:
        raise UnknownArgument(f"load_in_int8={load_in_int8!r} does not exist", fix="use True or False")
    if full_finetuning:
        raise UnknownArgument(
            "int8 weights cannot be trained", fix="leave out load_in_int8 or full_finetuning"
        )
    if bits == 8 or fp8:
        other = "load_in_fp8" if fp8 else "load_in_8bit"
        raise UnknownArgument(
            f"load_in_int8 and {other} exclude each other",
            fix="leave out one of them; load_in_4bit=True with load_in_int8=True stores 4 bits and multiplies int8",
        )
    names = check_eight_bit("int8", skip_layers, modules, copies)
    if hardware.int8.value is None:
        raise Int8Unavailable(
            f"{hardware.name} cannot multiply int8: {hardware.int8.reason}",
            fix="load with load_in_4bit=True for less memory, or without load_in_int8",
        )
    logger.info("pronghorn: int8 products, quantised: %s", hardware.int8.reason)
    return Int8Options(skip_layers or 0, names, copies)


def quantise_to_int8(model: Any, options: Int8Options, device: torch.device | None = None) -> None:
    """Bring the linear modules of the decoder layers into int8, those with the same input together, and everything to
    `device`. A model that lies on the CPU arrives on a GPU without ever being there in 16 bits. Modules that hold 4
    bits keep them and multiply int8.

    Args:
        device: None leaves everything where it is.

    Raises:
        UnknownArgument: when the options leave no module.
    """
    done, kept = 0, []
    layers = decoder_layers(model, "load_in_int8")
    chosen = range(options.skip_layers, len(layers) - options.skip_layers)
    for index in chosen:
        for paths in _groups(layers[index], model.config.model_type):
            modules = {path: layers[index].get_submodule(path) for path in paths}
            wanted = {path: module for path, module in modules.items() if _is_chosen(path, module, options)}
            plain = [path for path, module in wanted.items() if fits_int8(module)]
            four_bit = [path for path, module in wanted.items() if fits_int8_products(module)]
            kept += [f"layers.{index}.{path}" for path in wanted if path not in (*plain, *four_bit)]
            if plain:
                _quantise(layers[index], plain, options, device)
            if four_bit:
                add_int8_products([wanted[path] for path in four_bit])
            done += len(plain) + len(four_bit)
    tell_eight_bit("int8", done, kept, options)
    if device is not None:
        model.to(device)
    if is_int8(model):
        model.__dict__["save_pretrained"] = partial(save_dequantised, model)


def _is_chosen(path: str, module: nn.Module, options: Int8Options) -> bool:
    name = path.rpartition(".")[2]
    if options.modules is not None:
        return name in options.modules
    return not (fits_int8_products(module) and name in QUERIES_AND_KEYS)


def _groups(layer: nn.Module, model_type: str) -> Iterator[list[str]]:
    """Paths of a layer's linear modules: those with the same input together, where the family says which they are."""
    linear = [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
    family = family_of(model_type)
    if family is not None:
        parts = family.parts
        for parent, names in (
            (parts.attention, (parts.q, parts.k, parts.v)),
            (parts.mlp, (parts.gate, parts.up)),
        ):
            together = [path for path in (f"{parent}.{name}" for name in names) if path in linear]
            linear = [path for path in linear if path not in together]
            yield together
    yield from ([path] for path in linear)


def _quantise(layer: nn.Module, paths: list[str], options: Int8Options, device: torch.device | None) -> None:
    linears = [layer.get_submodule(path) for path in paths]
    made = Int8Linear.group(linears, copies=options.copies, device=device)  # type: ignore[arg-type]
    for path, module in zip(paths, made, strict=True):
        parent, _, name = path.rpartition(".")
        if device is not None:
            module.to(device)
        setattr(layer.get_submodule(parent), name, module)


def is_int8(model: nn.Module) -> bool:
    """Whether a model stores weights as our int8 codes."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
