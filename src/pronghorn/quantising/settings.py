"""What a user says about dynamic quantisation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pronghorn.errors import UnknownArgument

#: what `calibration` may say instead of naming rows
DOCSTRINGS = "docstrings"
#: about what double quantisation saves: with it, a model takes no more than plain NF4
DEFAULT_EXTRA = "9%"
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class DynamicQuantisation:
    """Which linear layers keep more bits at 4-bit loading, and on what rows their errors are measured.

    Args:
        extra: bytes to spend beyond 4 bits with double quantisation in all layers: a share such as "9%", which makes a
            model as large as plain NF4 without double quantisation, or a size such as "60MiB". 0 spends nothing, and
            weights are rounded to fit the rows all the same.
        calibration: texts, rows of any form that training takes, a data set or a file of them, best of the kind that
            the model will be trained on; "docstrings" for those of Python's own library, which are on every machine.
        tokens: of them that are read.
    """

    extra: str | int = DEFAULT_EXTRA
    calibration: Any = DOCSTRINGS
    tokens: int = 8192

    def __post_init__(self) -> None:
        self.extra_bytes(0)
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 64:
            raise UnknownArgument(
                f"tokens={self.tokens!r} are too few to measure on", fix="use 64 or more; 8,192 are enough"
            )

    def extra_bytes(self, base: int) -> int:
        """What may be spent beyond `base` bytes.

        Raises:
            UnknownArgument: for what is neither a share nor a size.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMG]I?B)?", str(self.extra).strip().upper())
        if match is None or isinstance(self.extra, bool | float):
            raise UnknownArgument(
                f"extra={self.extra!r} is no amount of bytes",
                fix='use a share such as "9%", or such as "60MiB"',
            )
        if match[2] == "%":
            return int(base * float(match[1]) / 100)
        return int(float(match[1]) * _UNITS[match[2] or ""])


def as_settings(dynamic_4bit: Any) -> DynamicQuantisation | None:
    """The settings that an argument stands for; None for False.

    Raises:
        UnknownArgument: for anything but True, False and settings.
    """
    if isinstance(dynamic_4bit, DynamicQuantisation):
        return dynamic_4bit
    if dynamic_4bit is True:
        return DynamicQuantisation()
    if dynamic_4bit is False or dynamic_4bit is None:
        return None
    raise UnknownArgument(
        f"dynamic_4bit={dynamic_4bit!r} does not exist",
        fix='use True, or DynamicQuantisation(extra="9%", calibration=rows)',
    )
