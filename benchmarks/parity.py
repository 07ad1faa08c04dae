"""What the parity checks found, for the sources they found it with. A speed without a green check is no claim.

`benchmarks.verify` (exact modes) and `benchmarks.gates` (8-bit modes) write here, `benchmarks.run` reads. An entry
holds for one state of what a training step is made of, and one kind of hardware only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_FILE = REPOSITORY / "benchmarks" / "results" / "parity.json"
#: packages of the library that no training step runs
NOT_IN_A_STEP = ("cli", "compat", "diagnostics", "experiments", "export", "inference", "tuning")
#: entries of other sources kept in the file, the newest
KEPT = 12

GREEN, RED, NOT_RUN = "green", "red", "not run"


@cache
def source_hash(folder: Path = REPOSITORY / "src" / "pronghorn") -> str:
    """Twelve digits that stand for the content of every Python file that a training step may run."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        if path.relative_to(folder).parts[0] in NOT_IN_A_STEP:
            continue
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def hardware_name() -> str:
    """The GPU's name, or CPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def record(
    kind: str, cases: Mapping[str, bool], path: Path = DEFAULT_FILE, hardware: str | None = None
) -> None:
    """Add outcomes to the file: case name -> whether it passed. A case checked again is replaced.

    Args:
        kind: "exact", or "fp8" for all modes of `benchmarks.gates`.
        cases: for "exact" named "FAMILY SIZE PRECISION LEVEL"; free for the gates.
    """
    entries = _read(path)
    key = {"source": source_hash(), "hardware": hardware or hardware_name(), "kind": kind}
    found = next((entry for entry in entries if all(entry[name] == key[name] for name in key)), None)
    if found is not None:
        entries.remove(found)
    merged = {**(found["cases"] if found else {}), **cases}
    entries = [*entries, {**key, "cases": merged}][-KEPT:]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(entries, indent=1) + "\n")
    os.replace(temporary, path)


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def state(
    kind: str,
    hardware: str,
    path: Path = DEFAULT_FILE,
    *,
    prefix: str = "",
    wanted: tuple[tuple[str, ...], ...] = (),
) -> str:
    """ "green", "red" or "not run" for the present sources on this hardware.

    Args:
        prefix: only cases whose name begins so are looked at.
        wanted: what has to be covered: for each group of texts at least one case must have all of them in its name
            (with a space before and after it). Only cases of some group are looked at; none given looks at all.
    """
    name = "CPU" if hardware.startswith("CPU") else hardware
    key = {"source": source_hash(), "hardware": name, "kind": kind}
    entry = next((e for e in _read(path) if all(e[field] == key[field] for field in key)), None)
    cases = {} if entry is None else entry["cases"]
    found = {case: passed for case, passed in cases.items() if case.startswith(prefix)}
    groups = [
        [passed for case, passed in found.items() if all(text in f" {case} " for text in texts)]
        for texts in (wanted or (("",),))
    ]
    if any(not all(group) for group in groups):
        return RED
    return GREEN if all(groups) else NOT_RUN
