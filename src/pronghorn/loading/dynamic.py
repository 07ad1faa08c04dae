"""`dynamic_4bit` of `from_pretrained`: what it goes together with."""

from __future__ import annotations

from typing import Any

from pronghorn.errors import QuantisationRefused, UnknownArgument
from pronghorn.families import MixtureParts, family_of
from pronghorn.quantising.settings import DynamicQuantisation, as_settings


def choose_dynamic(
    dynamic_4bit: Any, *, bits: int, quant_type: str, eight_bit_products: bool
) -> DynamicQuantisation | None:
    """The settings that the arguments of `from_pretrained` stand for; None without dynamic quantisation.

    Raises:
        UnknownArgument: for a value that does not exist, or does not go with the others.
    """
    settings = as_settings(dynamic_4bit)
    if settings is None:
        return None
    if bits != 4:
        raise UnknownArgument(
            "dynamic_4bit is for models that are loaded in 4 bits",
            fix="add load_in_4bit=True, or leave it out",
        )
    if quant_type != "nf4":
        raise UnknownArgument(
            f"dynamic_4bit rounds to nf4, not {quant_type}", fix="leave out bnb_4bit_quant_type"
        )
    if eight_bit_products:
        raise UnknownArgument(
            "dynamic_4bit keeps some layers in 16 bits, which 8-bit products would round",
            fix="leave out load_in_fp8 and load_in_int8",
        )
    return settings


def check_folder_holds(config: Any) -> None:
    """
    Raises:
        QuantisationRefused: for a model whose quantised form has no checkpoint.
    """
    family = family_of(config.model_type)
    if family is not None and family.mixture is not None:
        raise QuantisationRefused(
            "a mixture's stacks of experts have no form of 4 bits in a checkpoint that bitsandbytes reads",
            fix="load it with dynamic_4bit where it is trained; that measures again each time",
        )


def check_can_be_quantised(config: Any, mixture: MixtureParts | None) -> None:
    """
    Raises:
        QuantisationRefused: for a checkpoint that is quantised already, or experts stored with inputs in rows.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise QuantisationRefused(
            "the checkpoint is quantised already, and what that lost cannot be measured",
            fix="load it without dynamic_4bit, or load the 16-bit original with it",
        )
    if mixture is not None and mixture.transposed:
        raise QuantisationRefused(
            f"experts of {config.model_type} models are stored with inputs in rows, along which nothing is fitted",
            fix="load it without dynamic_4bit",
        )
