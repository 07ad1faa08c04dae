"""Notebooks run as scripts: their magics left out, an error told with its cell."""

import json

import pytest

from pronghorn.cli.main import main
from pronghorn.compat.notebook import as_script
from pronghorn.compat.script import run_script
from pronghorn.errors import CommandMisused

INSTALL = """%%capture
import os
if "COLAB_" not in "".join(os.environ):
    !pip install unsloth \\
        vllm
else:
    %pip install unsloth
version = !pip show unsloth
share = 7 %4"""
CELLS = [
    ("markdown", "# A title"),
    ("code", INSTALL),
    ("code", "%%bash\nls nowhere"),
    (
        "code",
        "from unsloth import FastLanguageModel\nmodel, _ = FastLanguageModel.from_pretrained('unsloth/x')",
    ),
    ("code", "display(model.config.hidden_size)\nmodel.config.hidden_size"),
]


def notebook(folder, cells, name="one.ipynb", **metadata):
    content = [
        {"cell_type": kind, "source": text.splitlines(keepends=True), "metadata": {}, "outputs": []}
        for kind, text in cells
    ]
    path = folder / name
    path.write_text(json.dumps({"cells": content, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_cells_run_behind_one_another(tmp_path, tiny, capsys):
    (tmp_path / "beside_the_notebook.py").write_text("VALUE = 5\n")
    path = notebook(tmp_path, [*CELLS, ("code", "from beside_the_notebook import VALUE")])
    seen = run_script(path, [], {"": tiny})
    assert (seen["share"], seen["VALUE"]) == (3, 5) and seen["model"].config.hidden_size == 64
    assert capsys.readouterr().out.strip().endswith("64")
    assert main(["run", "--model", tiny, str(path)]) == 0


def test_errors_are_told_with_their_cell(tmp_path, capsys):
    path = notebook(
        tmp_path, [*CELLS[:2], ("code", "import unsloth\n\nunsloth.FastModel.from_pretrained('./no')")]
    )
    assert main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"pronghorn: {path}, cell 3, line 3: [PH101]" in said and "Traceback" not in said
    path = notebook(tmp_path, [*CELLS[:2], ("code", "x = 1\nx['key']")], "two.ipynb")
    assert main(["run", str(path)]) == 1
    said = capsys.readouterr().err
    assert "x['key']" in said and f"that is {path}, cell 3, line 2" in said and "runpy" not in said


def test_what_is_no_notebook_of_python_is_refused(tmp_path):
    broken = tmp_path / "broken.ipynb"
    broken.write_text("not json")
    with pytest.raises(CommandMisused, match="cannot be read as a notebook"):
        as_script(broken)
    with pytest.raises(CommandMisused, match="notebook of julia"):
        as_script(notebook(tmp_path, CELLS, kernelspec={"language": "julia"}))


def test_lines_of_texts_and_brackets_are_no_shells(tmp_path):
    cell = 'text = """\n!list\n? why\n"""\nrest = (7\n    % 4)\n'
    found = run_script(notebook(tmp_path, [("code", cell)]))
    assert (found["text"], found["rest"]) == ("\n!list\n? why\n", 3)
