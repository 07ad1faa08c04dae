"""Storage of a linear layer's weight: plain, fp8, 4-bit or 8-bit, behind one interface."""

from pronghorn.weights.adjacent import side_by_side
from pronghorn.weights.base import DenseWeight, Weight
from pronghorn.weights.dequantised import StoredLinear
from pronghorn.weights.four_bit import is_four_bit, keep_expanded
from pronghorn.weights.fp8 import Fp8FourBitWeight, Fp8GradWeight, Fp8Weight
from pronghorn.weights.fp8_linear import Fp8Linear
from pronghorn.weights.gathered import Block, blocks_of, buffers_of, gather, size_of, tensors_of
from pronghorn.weights.int8 import Int8FourBitWeight, Int8Products, Int8Weight
from pronghorn.weights.int8_linear import Int8Linear
from pronghorn.weights.operand import Operand
from pronghorn.weights.quantised import BitsAndBytesInt8Weight, FourBitWeight
from pronghorn.weights.read import keep_four_bit_layout, read_weight
from pronghorn.weights.stack import join, join_tensors, keep_in_place, lay_side_by_side, stacked

__all__ = [
    "BitsAndBytesInt8Weight",
    "Block",
    "DenseWeight",
    "FourBitWeight",
    "Fp8FourBitWeight",
    "Fp8GradWeight",
    "Fp8Linear",
    "Fp8Weight",
    "Int8FourBitWeight",
    "Int8Linear",
    "Int8Products",
    "Int8Weight",
    "Operand",
    "StoredLinear",
    "Weight",
    "blocks_of",
    "buffers_of",
    "gather",
    "is_four_bit",
    "join",
    "join_tensors",
    "keep_expanded",
    "keep_four_bit_layout",
    "keep_in_place",
    "lay_side_by_side",
    "read_weight",
    "side_by_side",
    "size_of",
    "stacked",
    "tensors_of",
]
