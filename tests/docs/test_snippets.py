"""Blocks marked `<!-- run -->` run as they stand, page by page: with a tiny model for every id, and for two steps."""

import json
import re
import sys

import pytest
import torch

from pronghorn import hardware
from pronghorn.loading import fast
from tests.docs.pages import DOCS, ROOT, blocks
from tests.tiny import save_tiny

PAGES = [
    page
    for page in [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("README*.md"))]
    if any(block.needs is not None for block in blocks(page))
]
#: ids of the hub in the guide
MODELS = re.compile(r"\"(?:Qwen|meta-llama|HuggingFaceTB)/[\w.-]+\"")

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="the trainer would take the GPU, the tiny model the CPU"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny", "qwen2"))


@pytest.fixture(scope="module")
def tiny_vision(tmp_path_factory):
    tests = pytest.importorskip("tests.tiny_vision")
    return str(tests.save_tiny_vision(tmp_path_factory.mktemp("models") / "vision", "qwen2_5_vl"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Pages write below the current folder, see a machine without a GPU, and leave no module behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fast, "probe", hardware._cpu_hardware)
    yield
    drop_in = sys.modules.pop("pronghorn.compat.unsloth", None)
    if drop_in is not None:
        drop_in.DROP_IN.stop()


def write_rows(path):
    """Eight conversations, as `rows.jsonl` of the guide has them."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + {i}?"},
                {"role": "assistant", "content": f"{2 * i}."},
            ]
        }
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_snippets_run(page, tiny, tmp_path, request):
    tiny = request.getfixturevalue("tiny_vision") if page.stem == "vision" else tiny
    names = {"__name__": "__main__"}
    for block in blocks(page):
        if block.needs is None:
            continue
        assert block.language == "python"
        for needed in block.needs.split():
            write_rows(tmp_path / needed)
        code = re.sub(r"max_steps=\d+", "max_steps=2", MODELS.sub(repr(tiny), block.code))
        exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), names)


def test_pages_are_found():
    assert {"index", "memory", "methods", "README", "README.zh-CN"} <= {page.stem for page in PAGES}
