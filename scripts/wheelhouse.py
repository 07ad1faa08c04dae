"""Collect every wheel of pronghorn into one folder, for a machine without a network. Called by the Makefile.

pip resolves the whole set once for the other machine's Python and C library, then each wheel is fetched as it was
resolved. Without `--torch`, torch and the CUDA packages are left to the other machine's Python, which has them.
INSTALL.txt in the folder has the lines to type there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setup_venv import QUICKSTART_MODEL, ROOT, fail, requirements, say

#: Wheels that a Python with torch has already.
OF_TORCH = ("torch", "triton", "nvidia-", "cuda-")
#: The one of NVIDIA's that torch does not bring.
NOT_OF_TORCH = "nvidia-cudnn-frontend"
#: The oldest minor version of glibc that a wheel can name.
OLDEST_GLIBC = 5


def target(python: str, glibc: str, machine: str) -> list[str]:
    """pip's arguments for a Linux Python other than the running one; wheels for any older glibc fit, too."""
    newest = int(glibc.partition(".")[2])
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, OLDEST_GLIBC - 1, -1)]
    platforms += [f"{name}_{machine}" for name in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    arguments = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    return arguments + [part for platform in platforms for part in ("--platform", platform)]


def wanted(extras: list[str], torch: str) -> list[str]:
    """What is to be resolved: pronghorn's requirements, with `torch` naming the build where it is given."""
    found = requirements(extras)
    return [torch, *found] if torch else found


def is_of_torch(name: str) -> bool:
    plain = name.lower().replace("_", "-")
    return plain.startswith(OF_TORCH) and plain != NOT_OF_TORCH


def resolve(asked: list[str], where: list[str], indexes: list[str]) -> list[tuple[str, str]]:
    """(name, version) of everything that `asked` needs on the other machine."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # --target is what pip demands beside --platform; nothing is written there.
        done = pip(
            "install", "--dry-run", "--ignore-installed", "--target", folder, "--report", str(report),
            *where, *indexes, *asked,
        )  # fmt: skip
        if not done:
            fail("pip could not resolve the requirements", asked)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return sorted((one["metadata"]["name"], one["metadata"]["version"]) for one in found)


def pip(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "-q"]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def build_own(folder: str) -> None:
    """pronghorn's own wheel, from a copy: setuptools would leave its build folder in the tree, and find it again."""
    with tempfile.TemporaryDirectory() as copy:
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        shutil.copytree(
            ROOT / "src", Path(copy) / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
        )
        if not pip("wheel", "--no-deps", "--wheel-dir", folder, copy):
            fail("pip could not build pronghorn's own wheel", ["setuptools"])


def install_lines(folder: Path, python: str, extras: str, with_torch: bool, with_model: bool) -> str:
    """What to type on the other machine, where the folder lies beside."""
    offline = f"--no-index --find-links {folder.name}"
    over = "" if with_torch else " --system-site-packages"
    lines = [
        f"python{python} -m venv{over} pronghorn-env",
        f"pronghorn-env/bin/pip install {offline} 'pronghorn[{extras}]'",
        "pronghorn-env/bin/pronghorn doctor",
    ]
    if with_model:
        lines.insert(2, f"pronghorn-env/bin/pip install {offline} --no-deps {QUICKSTART_MODEL}")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--to", type=Path, required=True, help="the folder; wheels that it has stay")
    parser.add_argument("--extras", required=True)
    parser.add_argument("--torch", default="", help="such as torch==2.11.0; empty: the other machine has it")
    parser.add_argument("--index", default="", help="a package index that has the build of torch")
    parser.add_argument("--python", default="", help=f"of the other machine (default: as here, {here})")
    parser.add_argument("--glibc", default="2.35", help="of the other machine, or older")
    parser.add_argument("--machine", default="x86_64", choices=("x86_64", "aarch64"))
    options = parser.parse_args(argv)

    python = options.python or here
    if python != here:
        say(
            f"collecting for Python {python} with {here}: should a package be missing there, collect with {python}"
        )
    where = target(python, options.glibc, options.machine)
    indexes = ["--extra-index-url", options.index] if options.index else []
    found = resolve(wanted(options.extras.split(","), options.torch), where, indexes)
    if not options.torch:
        found = [(name, version) for name, version in found if not is_of_torch(name)]
    say(f"{len(found)} packages into {options.to}")
    options.to.mkdir(parents=True, exist_ok=True)
    pinned = [f"{name}=={version}" for name, version in found]
    folder = str(options.to.resolve())
    if not pip("download", "--no-deps", "--dest", folder, *where, *indexes, *pinned):
        fail("pip could not fetch all wheels", pinned)
    build_own(folder)
    with_model = "quickstart" in options.extras.split(",")
    if with_model and not pip("download", "--no-deps", "--dest", folder, *where, QUICKSTART_MODEL):
        fail("pip could not fetch the quickstart's model", [QUICKSTART_MODEL])
    lines = install_lines(options.to, python, options.extras, bool(options.torch), with_model)
    (options.to / "INSTALL.txt").write_text(lines, encoding="utf-8")
    wheels = list(options.to.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**30
    say(f"{len(wheels)} wheels, {size:.1f} GiB. On the other machine, beside the folder:")
    print(lines, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
