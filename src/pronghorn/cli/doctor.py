"""``pronghorn doctor`` and ``python -m pronghorn``."""

from __future__ import annotations

import json
from importlib.util import find_spec

from pronghorn.cli.console import say, table
from pronghorn.diagnostics import doctor
from pronghorn.errors import PackageMissing


def run(*, as_json: bool = False) -> int:
    """Print the report; 1 when something that is required is not installed, else 0."""
    if find_spec("torch") is None:
        raise PackageMissing("torch is not installed", fix="pip install 'torch>=2.10'")
    report = doctor.report()
    if as_json:
        say(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report)
    return 1 if report.missing else 0


def _print(report: doctor.Report) -> None:
    say(f"{report.python} on {report.system}")
    table(
        "Packages",
        ("package", "version", "for"),
        [
            (item.name, item.version or ("MISSING" if item.required else "not installed"), item.purpose)
            for item in report.packages
        ],
    )
    table("Hardware", ("fact", "value"), list(report.hardware.items()))
    table(
        "Paths",
        ("path", "here", "why"),
        [(item.name, item.value, item.reason) for item in report.paths],
    )
    if report.missing:
        say("Missing: pip install " + " ".join(item.name for item in report.missing))
