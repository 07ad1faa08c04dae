"""Storage of a linear layer's weight: plain, 4-bit or 8-bit, behind one interface."""

from pronghorn.weights.base import DenseWeight, Weight
from pronghorn.weights.operand import Operand
from pronghorn.weights.quantised import FourBitWeight, Int8Weight
from pronghorn.weights.read import keep_four_bit_layout, read_weight

__all__ = [
    "DenseWeight",
    "FourBitWeight",
    "Int8Weight",
    "Operand",
    "Weight",
    "keep_four_bit_layout",
    "read_weight",
]
