"""What the doctor tries: a name, a function that tries it, and what came of it.

A check's function returns one line about what it found, or raises `Unsound` (with what helps), `NotHere` where the
machine has nothing to check, or anything at all, which counts as a failure with that reason.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Literal

Status = Literal["PASS", "FAIL", "SKIP"]

#: Longest wait for one check. FlexAttention compiles for up to half a minute on a slow host.
LIMIT_SECONDS = 150.0


class Unsound(Exception):
    """A check found something wrong.

    Args:
        reason: what, in one line.
        fix: the smallest change that helps.
    """

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix


class NotHere(Exception):
    """There is nothing to check on this machine; says why, and what would change that.

    Args:
        reason: why.
        fix: what to do for those who want it.
    """

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True)
class Check:
    """Something to try.

    Args:
        group: the heading it stands under, and the process it runs in where there are cores for several.
        name: unique.
        target: its function as ``module:name``, imported only where it runs.
    """

    group: str
    name: str
    target: str

    def function(self) -> Callable[[], str]:
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Result:
    """What came of a check; `detail` is one line, `fix` what helps where something can be done."""

    group: str
    name: str
    status: Status
    detail: str
    seconds: float
    fix: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def perform(check: Check) -> Result:
    """Run a check to its end; nothing it raises leaves here."""
    began = time.perf_counter()
    fix = ""
    status: Status
    try:
        detail, status = check.function()(), "PASS"
        _settle()
    except NotHere as reason:
        detail, status, fix = str(reason), "SKIP", reason.fix
    except Unsound as reason:
        detail, status, fix = str(reason), "FAIL", reason.fix
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        detail, status, fix = _told(error), "FAIL", _fix(error)
    return Result(check.group, check.name, status, detail, round(time.perf_counter() - began, 3), fix)


def _settle() -> None:
    """Wait for the GPU, so that what a kernel did wrong is met by its own check."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _fix(error: BaseException) -> str:
    from pronghorn.diagnostics.translate import translate

    known = translate(error)
    return "" if known is None else known.fix


def device_lost() -> bool:
    """Whether the GPU refuses everything in this process from here on, as after an illegal memory access."""
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def by_group(checks: Iterable[Check]) -> dict[str, list[Check]]:
    """Checks by their group, in order."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.group, []).append(check)
    return groups
