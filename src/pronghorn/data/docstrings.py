"""Question and answer rows from the docstrings of Python's own standard library: real text on every machine.

The sources are parsed, never imported, so nothing runs. The same Python gives the same rows in the same order, and
the split depends only on each row's name.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path

from pronghorn.errors import PackageMissing

# Not a library a reader would ask about: tests, applications, generated tables, and vendored installers.
_SKIPPED_FOLDERS = {
    "test", "tests", "distutils", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "ensurepip",
    "pydoc_data", "encodings", "__pycache__", "_pyrepl",
}  # fmt: skip
# Where the documented name of a module differs from the file that holds it.
_PUBLIC_NAMES = {"posixpath": "os.path", "importlib._abc": "importlib.abc", "_pydatetime": "datetime"}
_NOT_PROSE = re.compile(r">>>|\.\. |^\s*[-=*]{3,}|^[A-Z_]+$|^\w+\s*=|\bTODO\b|^\w[\w.]*\(.*\)( -+>.*)?$")
_SHORTEST, _LONGEST = 24, 360
_LONGEST_SIGNATURE = 90


@dataclass(frozen=True)
class DocRow:
    """One documented function, method or class: ``name`` is its full dotted name."""

    name: str
    question: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """The row in the chat format that `pronghorn train` and TRL read."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


def docstring_rows(library: Path | None = None) -> list[DocRow]:
    """All usable rows of the standard library at ``library`` (default: this Python's), sorted by name.

    Each answer occurs once: of several objects that share a docstring the first by name is kept.

    Raises:
        PackageMissing: the library's sources are not on this machine.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    rows: dict[str, DocRow] = {}
    for path in sorted(library.rglob("*.py")):
        module = _module_name(path.relative_to(library))
        if module is not None:
            for row in _rows_of_module(module, path):
                rows.setdefault(row.name, row)
    seen: set[str] = set()
    unique = []
    for name in sorted(rows):
        key = re.sub(r"\W+", " ", rows[name].answer).strip().lower()
        if key not in seen:
            seen.add(key)
            unique.append(rows[name])
    if not unique:
        raise PackageMissing(
            "this Python comes without its library's source files",
            where=str(library),
            fix="use a Python with its .py files, or train on your own data: pronghorn train config.yaml",
        )
    return unique


def split_rows(
    rows: list[DocRow], held_back: int, always: tuple[str, ...] = ()
) -> tuple[list[DocRow], list[DocRow]]:
    """(training rows, held-back rows), in an order that depends on the rows' names alone.

    Rows named in ``always`` come first in the held-back part, where they exist.
    """
    shuffled = sorted(rows, key=lambda row: hashlib.sha256(row.name.encode()).digest())
    by_name = {row.name: row for row in rows}
    shuffled = [by_name[name] for name in always if name in by_name] + [
        r for r in shuffled if r.name not in always
    ]
    return shuffled[held_back:], shuffled[:held_back]


def _module_name(relative: Path) -> str | None:
    """``os.path`` for ``posixpath.py``; None for a file that is not part of the documented library."""
    parts = list(relative.with_suffix("").parts)
    if _SKIPPED_FOLDERS.intersection(parts[:-1]) or parts[0].startswith("config-"):
        return None
    if parts[-1] in ("__init__", "__main__"):
        if parts[-1] == "__main__":
            return None
        parts.pop()
    module = ".".join(parts)
    module = _PUBLIC_NAMES.get(module, module)
    return None if not module or any(part.startswith("_") for part in module.split(".")) else module


def _rows_of_module(module: str, path: Path) -> Iterator[DocRow]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # sources kept broken on purpose, such as lib2to3's test data
        return
    for node in tree.body:
        yield from _rows_of_node(module, node, method=False)


def _rows_of_node(owner: str, node: ast.stmt, *, method: bool) -> Iterator[DocRow]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith(
        "_"
    ):
        return
    name = f"{owner}.{node.name}"
    answer = _first_paragraph(ast.get_docstring(node, clean=False))
    if isinstance(node, ast.ClassDef):
        if answer:
            yield DocRow(name, f"What is the class `{name}` for?", answer)
        for child in node.body:
            yield from _rows_of_node(name, child, method=True)
    elif answer:
        yield DocRow(name, f"What does `{name}({_signature(node, method)})` do?", answer)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> str:
    """The arguments as written, without ``self`` and annotations; without defaults when long."""
    arguments = node.args
    decorators = {d.id for d in node.decorator_list if isinstance(d, ast.Name)}
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if method and "staticmethod" not in decorators:
        bound = arguments.posonlyargs or arguments.args
        if bound and len(arguments.defaults) < len(arguments.posonlyargs) + len(arguments.args):
            bound.pop(0)
    text = ast.unparse(arguments)
    if len(text) > _LONGEST_SIGNATURE:
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        text = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return text


def _first_paragraph(docstring: str | None) -> str | None:
    """The first paragraph as one line of prose, or None when it is no prose or has an odd length."""
    if not docstring:
        return None
    paragraphs = re.split(r"\n\s*\n", cleandoc(docstring).strip())
    text = " ".join(paragraphs[0].split())
    if len(paragraphs) > 1 and _NOT_PROSE.search(text) and len(text) < _LONGEST:
        text = " ".join(paragraphs[1].split())  # docstrings that open with their own signature
    text = text.replace("``", "`").strip()
    if not text.isascii() or _NOT_PROSE.search(text) or not _SHORTEST <= len(text) <= _LONGEST:
        return None
    if text.endswith(":"):  # announces a list or an example that is cut away
        return None
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?", ".)")) else text + "."
