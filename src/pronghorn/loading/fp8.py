"""Linear layers of a loaded model to fp8: which of them, in which form, and one after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pronghorn.errors import AdapterProblem, Fp8Unavailable, UnknownArgument
from pronghorn.export import save_merged
from pronghorn.families import family_of
from pronghorn.hardware import Hardware
from pronghorn.loading.arguments import check_eight_bit, tell_eight_bit
from pronghorn.quantising.layers import decoder_layers
from pronghorn.weights import Int8Linear, StoredLinear, lay_side_by_side
from pronghorn.weights.four_bit import add_fp8_products
from pronghorn.weights.fp8_linear import (
    Fp8Linear,
    add_fp8_input_grad,
    fits_fp8,
    renew_fp8_input_grads,
)

logger = logging.getLogger("pronghorn")


@dataclass(frozen=True)
class Fp8Options:
    """Which layers are multiplied in fp8, and how.

    Attributes:
        both: quantise the chosen modules for both products; False leaves their weights in 16 bits and their forward
            exact, and runs the input gradient in fp8.
        others: run the input gradients of the modules that were not chosen in fp8.
        rowwise: scales by row, or by whole matrix.
        skip_layers: decoder layers at either end whose modules are not chosen; None takes a quarter of them.
        modules: last parts of names of the modules to choose; None for all linear ones of the decoder layers.
        copies: how often weights are stored; 2 spares every input gradient the making of transposed codes.
    """

    both: bool = True
    others: bool = False
    rowwise: bool = True
    skip_layers: int | None = 2
    modules: tuple[str, ...] | None = None
    copies: int = 1


#: Values of `load_in_fp8`, with the layers and modules they choose unless told otherwise. On SmolLM2-135M the cosine of
#: adapter gradients to fp32 on the original weights is (median, worst; 2,048 tokens) True 0.980, 0.925; "mixed" 0.994,
#: 0.979; and (512 tokens) "backward" 0.997, 0.986; NF4 0.62, -0.24. Rounding the weights is most of it: to fp32 on the
#: stored weights True has 0.994, 0.978. Measure with benchmarks.gates.
KINDS: dict[bool | str, tuple[int | None, tuple[str, ...] | None]] = {
    True: (2, None),
    "mixed": (None, ("gate_proj", "up_proj", "down_proj")),
    "backward": (0, None),
}


def choose_fp8(
    load_in_fp8: bool | str,
    hardware: Hardware,
    *,
    bits: int,
    full_finetuning: bool,
    skip_layers: int | None,
    modules: Iterable[str] | None,
    copies: int,
) -> Fp8Options | None:
    """The options that the arguments of `from_pretrained` stand for; None without fp8.

    Raises:
        UnknownArgument: for values that do not exist or do not go together.
        Fp8Unavailable: on a GPU that cannot multiply e4m3.
    """
    if load_in_fp8 is False or load_in_fp8 is None:
        return None
    if load_in_fp8 not in KINDS:
        raise UnknownArgument(
            f"load_in_fp8={load_in_fp8!r} does not exist",
            fix='use True, "mixed" or "backward" (weights in 16 bits, input gradients in fp8)',
        )
    if full_finetuning:
        raise UnknownArgument("fp8 weights cannot be trained", fix="leave out load_in_fp8 or full_finetuning")
    if bits == 8 or (bits == 4 and load_in_fp8 is not True):
        raise UnknownArgument(
            f"load_in_fp8={load_in_fp8!r} and {bits}-bit weights exclude each other",
            fix="leave out one of them; load_in_4bit=True with load_in_fp8=True stores 4 bits and multiplies fp8",
        )
    names = check_eight_bit("fp8", skip_layers, modules, copies)
    default_skip, default_modules = KINDS[load_in_fp8]
    fact = hardware.fp8
    if fact.value is None:
        raise Fp8Unavailable(
            f"{hardware.name} cannot multiply fp8: {fact.reason}",
            fix="load with load_in_4bit=True for less memory, or without load_in_fp8",
        )
    logger.info("pronghorn: fp8 products, quantised: %s", fact.reason)
    return Fp8Options(
        both=load_in_fp8 != "backward",
        others=load_in_fp8 == "mixed",
        rowwise=fact.value != "tensors",
        skip_layers=default_skip if skip_layers is None else skip_layers,
        modules=default_modules if names is None else names,
        copies=copies,
    )


def quantise_layers(model: Any, options: Fp8Options, device: torch.device | None = None) -> None:
    """Bring the linear modules of the decoder layers into fp8, each on its own, and everything to `device`.

    A model that lies on the CPU arrives on a GPU without ever being there in 16 bits.

    Args:
        device: None leaves everything where it is.

    Raises:
        UnknownArgument: when the options leave no module.
    """
    done, kept = 0, []
    for path, parent, name, module, chosen in _linears(model, options):
        if not chosen:
            if options.others and fits_fp8(module):
                _to(module.requires_grad_(False), device)
                add_fp8_input_grad(module, rowwise=options.rowwise, keep_codes=options.copies == 2)
        elif _quantise(parent, name, module, options, device):
            done += 1
        else:
            kept.append(path)
    tell_eight_bit("fp8", done, kept, options)
    _to(model, device)
    _stack_groups(model)
    if is_fp8(model):
        model.__dict__["save_pretrained"] = partial(save_dequantised, model)


def _linears(model: Any, options: Fp8Options) -> Iterator[tuple[str, nn.Module, str, Any, bool]]:
    """(path, parent, name, module, chosen) of the linear modules of the decoder layers."""
    layers = decoder_layers(model, "load_in_fp8")
    first = -(-len(layers) // 4) if options.skip_layers is None else options.skip_layers
    last = len(layers) - first
    for index, layer in enumerate(layers):
        for path, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, name = path.rpartition(".")
                chosen = options.modules is None or name in options.modules
                chosen = chosen and first <= index < last
                yield f"layers.{index}.{path}", layer.get_submodule(parent), name, module, chosen


def _stack_groups(model: Any) -> None:
    """Lay the codes of projections with the same input side by side, where the family says which those are."""
    family = family_of(model.config.model_type)
    if family is None:
        return
    parts = family.parts
    for layer in decoder_layers(model, "load_in_fp8"):
        for parent, names in (
            (parts.attention, (parts.q, parts.k, parts.v)),
            (parts.mlp, (parts.gate, parts.up)),
        ):
            modules = [getattr(getattr(layer, parent, None), name, None) for name in names]
            quantised = [module for module in modules if isinstance(module, Fp8Linear)]
            if len(quantised) == len(modules):
                lay_side_by_side(quantised)


def _to(module: nn.Module, device: torch.device | None) -> None:
    if device is not None:
        module.to(device)


def _quantise(
    parent: nn.Module, name: str, module: Any, options: Fp8Options, device: torch.device | None
) -> bool:
    """One module; False when its shape does not fit."""
    if getattr(module.weight, "quant_state", None) is not None:
        return options.both and add_fp8_products(module, rowwise=options.rowwise)
    if not fits_fp8(module):
        return False
    module.weight.requires_grad_(False)
    if not options.both:
        _to(module, device)
        add_fp8_input_grad(module, rowwise=options.rowwise, keep_codes=options.copies == 2)
        return True
    quantised = Fp8Linear.of(module, rowwise=options.rowwise, device=device)
    _to(quantised, device)
    quantised.keep_transposed(options.copies == 2)
    setattr(parent, name, quantised)
    return True


def is_fp8(model: nn.Module) -> bool:
    """Whether a model stores weights as e4m3."""
    return any(isinstance(module, Fp8Linear) for module in model.modules())


def save_dequantised(model: Any, save_directory: str, max_shard_size: int | str = "5GB", **_: Any) -> None:
    """In the place of `save_pretrained`: a stock checkpoint of the model as it computes, its weights in 16 bits."""
    save_merged(model, None, save_directory, max_shard_size=max_shard_size, verify=False)


def know_stored(config: Any, model: nn.Module) -> None:
    """Let a LoRA config wrap fp8 and int8 modules so that PEFT can merge into them, and renew codes of weights that an
    earlier adapter was merged into.

    Raises:
        AdapterProblem: for what reads or trains a weight that is stored as codes.
    """
    renew_fp8_input_grads(model)
    stored = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, StoredLinear)}
    if stored and getattr(config, "use_dora", False):
        raise AdapterProblem(
            "DoRA takes norms of the weights, and these are stored as 8-bit codes",
            fix="use LoRA, or load the model without load_in_fp8 and load_in_int8",
        )
    whole = sorted(stored.intersection(getattr(config, "modules_to_save", None) or ()))
    if whole:
        raise AdapterProblem(
            f"modules_to_save trains {', '.join(whole)} whole, and their weights are stored as 8-bit codes",
            fix="take them out of it, or out of those that are quantised (int8_modules, fp8_modules)",
        )
    if stored and hasattr(config, "_register_custom_module"):
        from pronghorn.loading.fp8_adapter import StoredLoraLinear

        config._register_custom_module({Fp8Linear: StoredLoraLinear, Int8Linear: StoredLoraLinear})
