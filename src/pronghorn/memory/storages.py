"""How linear weights can be stored, and the bytes that each way takes."""

from __future__ import annotations

from collections.abc import Iterator

#: Bytes of an element of a plain dtype.
ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}
#: How the names of storages end whose weights are multiplied in another way than they are stored.
IN_FP8, IN_INT8, GRAD_IN_FP8 = " in fp8 products", " in int8 products", ", input gradient in fp8"
#: How linear weights can be stored, as `weights.Weight.storage` says it. "fp8 two" and "int8 two": also for the
#: input gradient. "bitsandbytes int8" is multiplied in 16 bits.
STORAGES = (
    *ELEMENT,
    "bfloat16" + GRAD_IN_FP8,
    "float16" + GRAD_IN_FP8,
    "nf4",
    "nf4 double",
    "nf4" + IN_FP8,
    "nf4 double" + IN_FP8,
    "nf4" + IN_INT8,
    "nf4 double" + IN_INT8,
    "bitsandbytes int8",
    "int8",
    "int8 two",
    "fp8",
    "fp8 two",
)


def stored_tensors(out: int, width: int, storage: str) -> Iterator[int]:
    """Bytes of the tensors of one stored weight [out, width]."""
    count = out * width
    if storage.endswith(GRAD_IN_FP8):
        yield from stored_tensors(out, width, storage.removesuffix(GRAD_IN_FP8))
        yield from (count, out * 4)
    elif storage.endswith(IN_FP8):
        yield from stored_tensors(out, width, storage.removesuffix(IN_FP8))
        yield out * 4
    elif storage.endswith(IN_INT8):
        # A group shares the scales of its inputs, which are counted for each: 0.03 % more than there is.
        yield from stored_tensors(out, width, storage.removesuffix(IN_INT8))
        yield from (out * 4, width * 4)
    elif storage in ELEMENT:
        yield count * ELEMENT[storage]
    elif storage.startswith("nf4"):
        blocks = -(-count // 64)
        yield count // 2
        yield 16 * 4
        if storage == "nf4":
            yield blocks * 4
        else:  # the blocks' scales in 8 bits, their own scales, the code of 256 values, the offset
            yield from (blocks, -(-blocks // 256) * 4, 256 * 4, 4)
    elif storage in ("bitsandbytes int8", "int8"):
        yield from (count, out * 4)
    elif storage == "int8 two":
        yield from (count, out * 4, count, width * 4)
    elif storage.startswith("fp8"):
        for _ in range(2 if storage == "fp8 two" else 1):
            yield count
        yield out * 4
    else:
        raise ValueError(f"storage '{storage}' is not one of {', '.join(STORAGES)}")
