"""The process that checks run in: it may crash, hang or lose its GPU without taking the doctor along.

python -m pronghorn.diagnostics.worker MODULE:REGISTRY, with the names of checks on standard input, one a line.

What it has to say is one JSON object a line: {"began": NAME}, then {"result": {...}}; {"lost": true} at the end where
the GPU refuses further work in this process. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pronghorn.diagnostics.checks import Check, device_lost, perform

#: what `registry.CHECKS` is called from outside
REGISTRY = "pronghorn.diagnostics.registry:CHECKS"


def read_registry(name: str) -> list[Check]:
    """The checks listed under ``module:name``."""
    module, _, attribute = name.partition(":")
    return list(getattr(import_module(module), attribute))


def main(arguments: Sequence[str]) -> int:
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    known = {check.name: check for check in read_registry(arguments[0] if arguments else REGISTRY)}

    def tell(**event: Any) -> None:
        channel.write(json.dumps(event) + "\n")
        channel.flush()

    for name in sys.stdin.read().splitlines():
        tell(began=name)
        result = perform(known[name])
        tell(result=result.as_dict())
        if result.status == "FAIL" and device_lost():
            tell(lost=True)
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
