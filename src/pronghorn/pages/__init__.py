"""HTML pages that are one file and need no network: texts of others escaped, light and dark, readable on a phone."""

from pronghorn.pages.document import STYLE, document, table, tiles, write_whole
from pronghorn.pages.text import duration, lines, short, shown, size, visible

__all__ = [
    "STYLE",
    "document",
    "duration",
    "lines",
    "short",
    "shown",
    "size",
    "table",
    "tiles",
    "visible",
    "write_whole",
]
