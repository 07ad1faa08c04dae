"""Rows: read, checked, cleaned, measured, rendered to tokens, packed. The names here are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pronghorn.importing import names_at_first_use

if TYPE_CHECKING:
    from pronghorn.data.checks import Report, check
    from pronghorn.data.cleaning import CleanResult, clean
    from pronghorn.data.lengths import LengthReport, stats

__all__ = ["CleanResult", "LengthReport", "Report", "check", "clean", "stats"]

# Not modules of these names: importing `pronghorn.data.check` would put the module in the function's place.
_HOME = {
    "CleanResult": "pronghorn.data.cleaning",
    "LengthReport": "pronghorn.data.lengths",
    "Report": "pronghorn.data.checks",
    "check": "pronghorn.data.checks",
    "clean": "pronghorn.data.cleaning",
    "stats": "pronghorn.data.lengths",
}


__getattr__ = names_at_first_use(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
