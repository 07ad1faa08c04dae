"""docs/installing.md: the container's recipe, the folder of wheels."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


@pytest.fixture
def wheelhouse(monkeypatch):
    """scripts/wheelhouse.py, which imports its neighbour as a script does."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("wheelhouse", ROOT / "scripts" / "wheelhouse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("setup_venv", None)


def instructions():
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, rest) for word, rest in lines]


def test_the_base_is_pinned_and_a_runtime_with_cuda():
    found = instructions()
    assert found[:2] == [("ARG", found[0][1]), ("FROM", "${BASE}")]
    tag = re.fullmatch(r"BASE=pytorch/pytorch:(\d+\.\d+)\.\d+-cuda\d+\.\d+-cudnn\d+-runtime", found[0][1])
    major, minor = map(int, tag[1].split("."))
    assert (major, minor) >= (2, 10)  # as pyproject.toml asks for torch


def test_the_image_runs_the_doctor_without_roots_rights():
    found = instructions()
    words = [word for word, _ in found]
    user = found[words.index("USER")][1]
    assert user.split(":")[0] not in ("root", "0")
    assert found[-1] == ("CMD", '["pronghorn", "doctor"]')
    assert max(i for i, word in enumerate(words) if word == "RUN") < words.index("USER")


def test_its_extras_exist():
    (extras,) = [rest.removeprefix("EXTRAS=") for word, rest in instructions() if rest.startswith("EXTRAS=")]
    assert set(extras.split(",")) <= EXTRAS.keys()
    for page in (DOCS / "installing.md", DOCS / "zh" / "installing.md"):
        text = page.read_text(encoding="utf-8")
        for named in re.findall(r"EXTRAS=([\w,-]+)|pronghorn\[([\w,-]+)\]", text):
            assert set("".join(named).split(",")) <= EXTRAS.keys()
        assert "`, `".join(extras.split(",")) in text or "`、`".join(extras.split(",")) in text


def test_what_it_copies_is_sent_to_it():
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    assert "*" in sent and copied
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in sent


def test_wheels_are_for_the_other_machine(wheelhouse):
    where = wheelhouse.target("3.12", "2.28", "aarch64")
    assert where[where.index("--python-version") + 1] == "3.12"
    platforms = [where[i + 1] for i, part in enumerate(where) if part == "--platform"]
    assert platforms[0] == "manylinux_2_28_aarch64" and "manylinux2014_aarch64" in platforms
    assert not any("2_29" in platform or "x86" in platform for platform in platforms)


def test_torch_is_named_first_or_left_to_the_other_machine(wheelhouse):
    assert wheelhouse.wanted(["gpu"], "torch==2.11.0")[0] == "torch==2.11.0"
    assert any(one.startswith("bitsandbytes") for one in wheelhouse.wanted(["gpu"], ""))
    kept = [
        name
        for name in ("torch", "triton", "nvidia-cublas", "cuda_bindings")
        if not wheelhouse.is_of_torch(name)
    ]
    assert kept == []
    assert not wheelhouse.is_of_torch("nvidia_cudnn_frontend") and not wheelhouse.is_of_torch("tokenizers")


def test_the_lines_are_those_of_the_guide(wheelhouse):
    lines = wheelhouse.install_lines(Path("build/wheels"), "3.12", "gpu,gguf,quickstart", True, True)
    page = (DOCS / "installing.md").read_text(encoding="utf-8")
    assert lines in page
    assert "--system-site-packages" in wheelhouse.install_lines(Path("w"), "3.12", "gpu", False, False)
