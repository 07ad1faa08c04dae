"""The guide's pages as tests read them: fenced blocks, links, headings."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
#: English page -> its Chinese version
IN_CHINESE = {page: DOCS / page.name for page in sorted((DOCS / "zh").glob("*.md"))}

_FENCE = re.compile(
    r"^(?:<!-- run(?:: (?P<needs>[\w. ]+))? -->\n\n?)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_MARK = re.compile(r"^<!-- run\b.*$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block. `needs`: the file that a marked block reads, or ""; None where there is no mark."""

    language: str
    code: str
    needs: str | None
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        marked = match[0].startswith("<!--")
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(
            Block(match["language"], match["code"], (match["needs"] or "") if marked else None, line)
        )
    return found


def marks(page: Path) -> int:
    """How many blocks are meant to run; a mark that stands before no block is one without a block."""
    return len(_MARK.findall(page.read_text(encoding="utf-8")))


def links(page: Path) -> list[str]:
    """Targets of links and pictures, outside of blocks and code."""
    return _LINK.findall(_prose(page))


def anchors(page: Path) -> set[str]:
    """What a link to a heading may name after `#`."""
    return {slug(heading) for heading in _HEADING.findall(_without_blocks(page))}


def headings(page: Path) -> list[int]:
    """Levels of the headings in order."""
    return [len(match[0]) for match in re.finditer(r"^#+(?= )", _without_blocks(page), re.MULTILINE)]


def slug(heading: str) -> str:
    kept = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading).lower())
    return re.sub(r"\s", "-", kept.strip())


def tables(page: Path) -> list[list[list[str]]]:
    """Each table as the cells of its lines."""
    found = re.findall(r"(?:^ *\|.*\n)+", _without_blocks(page), re.MULTILINE)
    return [[_cells(line) for line in text.splitlines()] for text in found]


def table_rows(page: Path) -> list[list[str]]:
    """The cells of every line of all tables, headers included."""
    return [row for rows in tables(page) for row in rows]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """(line of the page, command line) of every call of `pronghorn` in its shell blocks."""
    for block in blocks(page):
        if block.language in ("bash", "", "console"):
            for number, line in enumerate(block.code.replace("\\\n", "  ").splitlines()):
                if re.match(r"pronghorn [a-z]", line):
                    yield block.line + number, line


def code_alone(code: str) -> list[str]:
    """The tokens of a Python block without comments and texts: the same in every language."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [
        token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.STRING, tokenize.NL)
    ]


def _without_blocks(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def _prose(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", _without_blocks(page))
