"""Rows: read, checked, cleaned, measured, rendered to tokens, packed. The names here are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.data.checks import Report, check
    from pronghorn.data.cleaning import CleanResult, clean
    from pronghorn.data.lengths import LengthReport, stats

__all__ = ["CleanResult", "LengthReport", "Report", "check", "clean", "stats"]

# Not modules of these names: importing `pronghorn.data.check` would put the module in the function's place.
_HOME = {
    "CleanResult": "cleaning",
    "LengthReport": "lengths",
    "Report": "checks",
    "check": "checks",
    "clean": "cleaning",
    "stats": "lengths",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pronghorn.data' has no attribute '{name}'")
    return getattr(import_module(f"pronghorn.data.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
