"""`import pronghorn.compat.unsloth` at the top of a notebook: from here on `import unsloth` is this library.

Importing this module is the request; it stays so until the process ends. `pronghorn run` does the same for one script.
"""

from __future__ import annotations

from typing import Any

from pronghorn.compat.aliases import DropIn, resolve
from pronghorn.compat.names import MODULES

DROP_IN = DropIn().start()


def __getattr__(name: str) -> Any:
    if name not in MODULES["unsloth"]:
        raise AttributeError(f"module 'pronghorn.compat.unsloth' has no attribute '{name}'")
    return resolve(MODULES["unsloth"][name])
