"""Importing large libraries in less time, and names of a package when they are first used."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's cyclic garbage collector does not run inside; for imports.

    torch, Transformers, PEFT and TRL make a million objects that all stay. The collector looks at them again and again
    while they are made, for a fifth of the time that importing them takes (a third where modules are compiled, too). It
    goes on afterwards, with all of them as old objects, which spares it a look at every one as if it were new. Where it
    is off already, it stays off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # what somebody has frozen stays so
            # Together they make the young objects old without looking at them.
            gc.freeze()
            gc.unfreeze()
        gc.enable()


@contextmanager
def left_out_of_collections() -> Iterator[None]:
    """Collections inside do not look at what was there before: half a second each, for what the libraries hold.

    For commands: garbage of before is not collected inside either, and a notebook may have left a model there.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def names_at_first_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` for names whose modules are imported when one is asked for.

    Args:
        homes: by name the module, in full.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(homes[name]), name)

    return get
