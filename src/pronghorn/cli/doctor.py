"""``pronghorn doctor`` and ``python -m pronghorn``: what is here, and whether it works.

Facts first (versions, hardware, which paths are taken and why), then every check as it finishes. The exit status is 1
when a check failed or something required is not installed, else 0.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

from pronghorn.cli.console import duration, heading, is_terminal, say, table, wrapped
from pronghorn.diagnostics import doctor, runner
from pronghorn.diagnostics.checks import Result, Status
from pronghorn.diagnostics.registry import CHECKS
from pronghorn.errors import PackageMissing

_STYLES: dict[Status, str] = {"PASS": "green", "FAIL": "bold red", "SKIP": "dim"}


def run(*, as_json: bool = False, facts_only: bool = False, hints: bool = False) -> int:
    """Print facts and checks; 1 when something required is missing or a check failed, else 0."""
    if find_spec("torch") is None:
        raise PackageMissing("torch is not installed", fix="pip install 'torch>=2.10'")
    began = time.perf_counter()
    report = doctor.report()
    if not as_json:
        _print_facts(report)
    results: list[Result] = []
    if not facts_only:
        if not as_json:
            heading("Checks")
        results = runner.run_apart(report=_quiet if as_json else _print_result)
    seconds = time.perf_counter() - began
    failed = [result for result in results if result.status == "FAIL"]
    if as_json:
        say(json.dumps(_as_dict(report, results, seconds), indent=2))
    else:
        _print_end(report, results, seconds, hints)
    return 1 if failed or report.missing else 0


def _as_dict(report: doctor.Report, results: Sequence[Result], seconds: float) -> dict[str, object]:
    """The facts' keys, and with checks `checks`, `counts`, `seconds` and `ok`."""
    if not results:
        return report.as_dict()
    counts = Counter(result.status for result in results)
    return {
        **report.as_dict(),
        "checks": [result.as_dict() for result in results],
        "counts": {status: counts[status] for status in _STYLES},
        "seconds": round(seconds, 2),
        "ok": not counts["FAIL"] and not report.missing,
    }


def _print_facts(report: doctor.Report) -> None:
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


def _quiet(result: Result) -> None:
    """Nothing is printed before the JSON object."""


def _print_result(result: Result) -> None:
    width = max(len(check.name) for check in CHECKS)
    line = f"{result.name.ljust(width)}  {result.seconds:6.2f} s  {result.detail}"
    if is_terminal():
        from rich.console import Console
        from rich.text import Text

        Console().print(Text.assemble((result.status, _STYLES[result.status]), "  ", line))
    else:
        say(f"{result.status}  {line}")


def _print_end(report: doctor.Report, results: Sequence[Result], seconds: float, hints: bool) -> None:
    if not results:
        return
    counts = Counter(result.status for result in results)
    say(
        f"\n{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} do not apply here, "
        f"in {duration(seconds)}"
    )
    told = [result for result in results if result.fix and result.status in ("FAIL", "SKIP")]
    if hints and told:
        heading("What helps")
        for result in told:
            say(f"{result.name}: {result.detail}")
            say(wrapped(result.fix, "    "))
    elif any(result.status == "FAIL" and result.fix for result in results):
        say("What helps: pronghorn doctor --fix-hints")
