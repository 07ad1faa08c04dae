"""A page: its head, its policy, its style sheet, and the parts that all pages have."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from pronghorn.pages.text import shown

#: What all pages share; a page adds its own rules.
STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #ffffff; --text: #22201c; --soft: #6b665e;
  --line: #e4e0d8; --error: #b3261e; --error-back: #fbe9e7; --warning: #8a5a00; --warning-back: #fdf2d8;
  --good: #2c6e3f; --good-back: #e5f3e8; --bar: #b5763a; --bar-soft: #ead9c6; --mark: #22201c; }
@media (prefers-color-scheme: dark) { :root { --page: #171614; --card: #201f1c; --text: #ece8e1; --soft: #a29b90;
  --line: #37342f; --error: #ff8a80; --error-back: #3a1f1d; --warning: #f2c063; --warning-back: #362b14;
  --good: #84d19a; --good-back: #1b3122; --bar: #d9985a; --bar-soft: #4a3a2a; --mark: #ece8e1; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 0 0 2px; overflow-wrap: anywhere; }
p { margin: 0 0 8px; } .soft { color: var(--soft); } .small { font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 16px; } .tile b { display: block; font-size: 24px; line-height: 1.2;
  font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); font-size: 13px; }
.card { padding: 16px 18px; margin: 0 0 14px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 14px; }
.grid .card { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; font-size: 13px;
  color: var(--soft); } th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; } .number { text-align: right; font-variant-numeric: tabular-nums; }
.tag { display: inline-block; padding: 1px 8px; border-radius: 999px; font-size: 12px; font-weight: 600; }
.error { color: var(--error); background: var(--error-back); }
.warning { color: var(--warning); background: var(--warning-back); }
.good { color: var(--good); background: var(--good-back); }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Noto Sans Mono", monospace; }
pre { margin: 4px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.list { padding: 2px 18px; } .list > details { border-bottom: 1px solid var(--line); padding: 10px 0; }
.list > details:last-child { border-bottom: 0; } .list summary .number { margin-left: auto; font-weight: 600; }
.list summary .soft.small { flex-basis: 100%; padding-left: 18px; }
details > summary { cursor: pointer; list-style: none; display: flex; gap: 10px; align-items: baseline;
  flex-wrap: wrap; }
details > summary::-webkit-details-marker { display: none; }
details > summary::before { content: "▸"; color: var(--soft); } details[open] > summary::before { content: "▾"; }
details .item { border-top: 1px solid var(--line); padding: 8px 0; overflow-wrap: anywhere; }
details .item:first-of-type { margin-top: 10px; }
.field { color: var(--soft); font-size: 13px; margin-top: 8px; }
@media (max-width: 560px) { main { padding: 24px 14px 48px; } }
"""


def document(title: str, body: Sequence[str], *, style: str = "", script: str = "") -> str:
    """A whole page. Its policy forbids whatever is not in it: of scripts, all but the very one that is given.

    Args:
        title: plain text.
        body: parts of HTML, in which every text of others is escaped.
        style: rules beside `STYLE`.
        script: our own, never with a text of others in it.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    scripts = ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        scripts = f"<script>{script}</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{shown(title, 120)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f"\n</main>\n{scripts}</body>\n</html>\n"
    )


def write_whole(text: str, path: Path) -> None:
    """Write a text file, whole or not at all: beside its place, then renamed. A folder in its place is not replaced.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """The page's main figures: (figure, what it is), both plain text."""
    cells = "".join(
        f'<div class="tile"><b>{shown(value, 80)}</b><span>{shown(name, 120)}</span></div>'
        for value, name in facts
    )
    return f'<div class="tiles">{cells}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """Rows of HTML cells; `numbers` are the columns set to the right."""
    right = set(numbers)

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if index in right else ''}>{cell}</{tag}>"
            for index, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="card scroll"><table><tr>{cells(columns, "th")}</tr>{body}</table></div>'
