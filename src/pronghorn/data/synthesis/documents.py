"""Documents as sections of plain text under their headings: text, Markdown, HTML, PDF, Word."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pronghorn.errors import DocumentUnreadable, PackageMissing


@dataclass(frozen=True)
class Section:
    """Text under one heading. `headings` are the titles above it, the outermost first."""

    headings: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Document:
    """Args:
    name: the path as it was given.
    digest: SHA-256 of the file.
    """

    name: str
    digest: str
    sections: tuple[Section, ...]


def read_documents(paths: Iterable[str | os.PathLike[str] | Document]) -> list[Document]:
    """All documents that files and folders name; those of a folder in the order of their names. Read ones stay.

    Raises:
        DocumentUnreadable: a path that does not exist, is of no known kind, damaged, or without text.
        PackageMissing: what reads this kind of document is not installed.
    """
    documents: list[Document] = []
    for path in paths:
        documents += [path] if isinstance(path, Document) else map(read_document, _files(path))
    return documents


def read_document(path: str | os.PathLike[str]) -> Document:
    """One document; see `read_documents`."""
    path = Path(path)
    read = READERS.get(path.suffix.lower())
    if read is None and not path.exists():
        raise DocumentUnreadable(f"'{path}' cannot be read: there is no such file", fix="check the name")
    if read is None:
        raise DocumentUnreadable(
            f"'{path}' is of no kind that is read",
            fix=f"give one of {', '.join(READERS)}, or a folder of them",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DocumentUnreadable(f"'{path}' cannot be read: {error.strerror}", fix="check the name") from None
    sections = tuple(section for section in read(path, data) if section.text.strip())
    if not sections:
        scanned = (
            ": the pages may be pictures, which need text recognition"
            if path.suffix.lower() == ".pdf"
            else ""
        )
        raise DocumentUnreadable(
            f"'{path}' holds no text{scanned}", fix="leave it out, or convert it to text"
        )
    return Document(str(path), hashlib.sha256(data).hexdigest(), sections)


def _files(given: str | os.PathLike[str]) -> Iterator[Path]:
    path = Path(given).expanduser()
    if not path.is_dir():
        yield path
        return
    inside = sorted(item for item in path.rglob("*") if item.suffix.lower() in READERS and item.is_file())
    if not inside:
        raise DocumentUnreadable(
            f"the folder '{given}' holds no documents", fix=f"put files of {', '.join(READERS)} into it"
        )
    yield from inside


# --- plain text and Markdown ------------------------------------------------------------------------------------


def _decoded(path: Path, data: bytes) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DocumentUnreadable(
            f"'{path}' is no UTF-8 text (byte {error.start})", fix="convert it: iconv -f LATIN1 -t UTF-8"
        ) from None


def _text(path: Path, data: bytes) -> Iterator[Section]:
    yield Section((), _decoded(path, data).strip())


_HEADING = re.compile(r"^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$")
_FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]\[]*)\]\([^)\s]*(?:\s+\"[^\"]*\")?\)")
_EMPHASIS = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1")


def _markdown(path: Path, data: bytes) -> Iterator[Section]:
    """Sections by `#` headings; links become their words, pictures and comments go, code stays."""
    text = _COMMENT.sub("", _FRONT_MATTER.sub("", _decoded(path, data)))
    titles: dict[int, str] = {}
    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        heading = None if fence or mark else _HEADING.match(line)
        if heading is None:
            lines.append(
                line if fence or mark else _EMPHASIS.sub(r"\2", _LINK.sub(r"\1", _IMAGE.sub("", line)))
            )
            continue
        yield Section(_above(titles), "\n".join(lines).strip())
        lines = []
        level = len(heading[1])
        titles = {depth: title for depth, title in titles.items() if depth < level}
        titles[level] = _LINK.sub(r"\1", _IMAGE.sub("", heading[2])).strip("*_ ")
    yield Section(_above(titles), "\n".join(lines).strip())


def _above(titles: dict[int, str]) -> tuple[str, ...]:
    return tuple(titles[level] for level in sorted(titles) if titles[level])


# --- HTML, PDF, Word --------------------------------------------------------------------------------------------


def _package(name: str, install: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise PackageMissing(
            f"the package {install}, which reads this kind of document, is not installed",
            fix=f"pip install 'pronghorn[documents]', or pip install {install}",
        ) from None


_BLOCKS = ["p", "li", "pre", "blockquote", "td", "th", "dt", "dd", "figcaption", "caption"]
_HEADINGS = ["h1", "h2", "h3", "h4", "h5", "h6"]
_ASIDE = ["script", "style", "noscript", "template", "nav", "header", "footer", "aside", "form", "svg"]


def _html(path: Path, data: bytes) -> Iterator[Section]:
    """Sections by h1 to h6; navigation, scripts and forms go."""
    soup = _package("bs4", "beautifulsoup4").BeautifulSoup(data, "html.parser")
    for element in soup.find_all(_ASIDE):
        element.decompose()
    root = soup.find("main") or soup.find("article") or soup.body or soup
    titles: dict[int, str] = {}
    parts: list[str] = []
    for element in root.find_all(_HEADINGS + _BLOCKS + ["div", "section"]):
        if element.name in _HEADINGS:
            yield Section(_above(titles), "\n\n".join(parts))
            parts = []
            level = int(element.name[1])
            titles = {depth: title for depth, title in titles.items() if depth < level}
            titles[level] = " ".join(element.get_text(" ").split())
        elif (text := _own_text(element)) and not element.find_parent(_BLOCKS):
            parts.append(text)
    if not parts and not titles:
        parts = [" ".join(root.get_text(" ").split())]
    yield Section(_above(titles), "\n\n".join(parts))


def _own_text(element: Any) -> str:
    """A block's text; of a container only what stands outside of its blocks."""
    if element.name == "pre":
        return str(element.get_text()).strip("\n")
    if element.name in _BLOCKS:
        return " ".join(element.get_text(" ").split())
    return " ".join(" ".join(element.find_all(string=True, recursive=False)).split())


def _pdf(path: Path, data: bytes) -> Iterator[Section]:
    """The pages' text, with lines put together into paragraphs and words that were cut at line ends."""
    from io import BytesIO

    pypdf = _package("pypdf", "pypdf")
    try:
        reader = pypdf.PdfReader(BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentUnreadable(f"'{path}' is protected by a password", fix="remove the protection")
        pages = [page.extract_text() or "" for page in reader.pages]
    except DocumentUnreadable:
        raise
    except Exception as error:  # pypdf raises errors of many kinds for damaged files
        raise DocumentUnreadable(
            f"'{path}' is no PDF that can be read: {error}", fix="save it again"
        ) from error
    text = re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", "\n".join(pages))
    yield Section((), re.sub(r"(?<![.!?:。！？：\n])\n(?!\n)", " ", text).strip())


def _word(path: Path, data: bytes) -> Iterator[Section]:
    """Sections by the styles "Heading 1" to 9 and "Title"; a table's rows are lines."""
    from io import BytesIO

    docx = _package("docx", "python-docx")
    try:
        body = list(docx.Document(BytesIO(data)).iter_inner_content())
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise DocumentUnreadable(f"'{path}' is no Word document: {error}", fix="save it as .docx") from error
    titles: dict[int, str] = {}
    parts: list[str] = []
    for block in body:
        if hasattr(block, "rows"):
            parts.append("\n".join(" | ".join(cell.text.strip() for cell in row.cells) for row in block.rows))
            continue
        heading = re.fullmatch(r"(?:Heading (\d)|(Title))", (block.style.name if block.style else "") or "")
        if heading is None:
            parts.append(block.text.strip())
            continue
        yield Section(_above(titles), "\n\n".join(part for part in parts if part))
        parts = []
        level = int(heading[1] or 0)
        titles = {depth: title for depth, title in titles.items() if depth < level}
        titles[level] = block.text.strip()
    yield Section(_above(titles), "\n\n".join(part for part in parts if part))


READERS: dict[str, Callable[[Path, bytes], Iterable[Section]]] = {
    ".txt": _text,
    ".rst": _text,
    ".md": _markdown,
    ".markdown": _markdown,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
    ".docx": _word,
}
