"""The catalogue of errors, docs/errors.md, written from the classes in `pronghorn.errors`.

python -m pronghorn.diagnostics.catalogue --write docs/errors.md
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from pathlib import Path

from pronghorn import errors

GROUPS = {
    "1": "Checkpoints and models",
    "2": "Adapters and the engine",
    "3": "Data",
    "4": "Configuration and commands",
    "5": "Hardware and memory",
    "6": "Saving and export",
}
_HEAD = """\
# Errors

Everything a user can cause ends in one of these: one line with a code that does not change, what happened, where, and
the smallest change that helps. The command prints it without a traceback and exits with status 2; in Python it is an
exception of `pronghorn.errors`, all of them subclasses of `PronghornError`.

```
[PH401] unknown key 'lerning_rate' under 'training' (config.yaml, line 12). Fix: did you mean 'learning_rate'?
```

This file is written by `python -m pronghorn.diagnostics.catalogue --write docs/errors.md`.
"""


def error_classes() -> list[type[errors.PronghornError]]:
    """All error classes of `pronghorn.errors` except the base, by code."""
    found = [
        item
        for _, item in inspect.getmembers(errors, inspect.isclass)
        if issubclass(item, errors.PronghornError) and item is not errors.PronghornError
    ]
    return sorted(found, key=lambda item: item.code)


def catalogue() -> str:
    """The text of docs/errors.md."""
    parts = [_HEAD]
    for digit, title in GROUPS.items():
        members = [item for item in error_classes() if item.code[2] == digit]
        if members:
            rows = [f"| {item.code} | `{item.__name__}` | {_purpose(item)} |" for item in members]
            parts.append(
                "\n".join(
                    [
                        f"## PH{digit}xx: {title}",
                        "",
                        "| code | class | when |",
                        "| --- | --- | --- |",
                        *rows,
                        "",
                    ]
                )
            )
    return "\n".join(parts)


def _purpose(item: type) -> str:
    first = inspect.getdoc(item) or ""
    return " ".join(first.split("\n\n")[0].split()).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the catalogue of errors, or write it to a file.")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.write is None:
        sys.stdout.write(catalogue())
        return
    temporary = options.write.with_name(options.write.name + ".tmp")
    temporary.write_text(catalogue(), encoding="utf-8")
    os.replace(temporary, options.write)


if __name__ == "__main__":
    main()
