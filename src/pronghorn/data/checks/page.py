"""The result of a check as one HTML page: no script, no font, no picture from elsewhere, light and dark.

Every text from the data goes through `_shown` or `html.escape`; the page's own policy forbids all but its style sheet.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from pronghorn.data.checks.formats import NAMES
from pronghorn.data.checks.report import FileFacts, Report
from pronghorn.data.reading import KINDS, visible
from pronghorn.errors import CommandMisused

#: Problems of one kind on the page.
LISTED = 50
BINS = 36

_STYLE = """
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
svg { display: block; width: 100%; height: auto; margin-top: 8px; } svg text { fill: var(--soft); font-size: 11px; }
.bar { fill: var(--bar); } .bar.cut { fill: var(--bar-soft); } .axis { stroke: var(--line); }
.limit { stroke: var(--mark); stroke-dasharray: 4 3; }
"""


def write_page(report: Report, path: Path) -> Path:
    """Write the page; a file in its place is replaced, a folder is not.

    Raises:
        CommandMisused: it cannot be written.
    """
    read = {os.path.realpath(file.name) for file in report.files}
    if os.path.realpath(path) in read:
        raise CommandMisused(f"'{path}' is a file that was checked", fix="name another file with --html")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(page(report))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CommandMisused(
            f"the page '{path}' cannot be written: {error.strerror}", fix="name another file with --html"
        ) from None
    return path


def page(report: Report) -> str:
    """The page as text."""
    names = ", ".join(file.name for file in report.files)
    body = [
        f"<h1>{_shown(names, 200)}</h1>",
        f'<p class="soft">{_verdict(report)}</p>',
        _tiles(report),
        "<h2>Files</h2>",
        _files(report.files),
        *(["<h2>Problems</h2>", _problems(report)] if report.counts else []),
        "<h2>Lengths</h2>",
        _lengths(report),
        "<h2>Samples</h2>",
        *(_samples(file) for file in report.files),
        *(f'<p class="soft small">{escape(note)}</p>' for note in report.notes),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_shown(names, 80)}: data check</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _verdict(report: Report) -> str:
    if report.clean:
        return '<span class="tag good">no problems</span> These rows can be trained on as they are.'
    parts = [
        f'<span class="tag {level}">{count:,} {level}{"" if count == 1 else "s"}</span>'
        for level, count in (("error", report.errors), ("warning", report.warnings))
        if count
    ]
    repaired = sum(count for kind, count in report.counts.items() if KINDS[kind].repaired)
    also = f" <code>pronghorn data clean</code> repairs {repaired:,} of them." if repaired else ""
    return " ".join(parts) + also


def _tiles(report: Report) -> str:
    files = report.files
    tiles = [
        (f"{sum(file.rows + file.unread for file in files):,}", "rows"),
        (f"{sum(file.bad_rows for file in files):,}", "rows with errors"),
        (
            _size(sum(file.size for file in files)),
            "in " + (f"{len(files)} files" if len(files) > 1 else "one file"),
        ),
    ]
    if report.measured:
        tokens = sum(sum(file.tokens) for file in files)
        supervised = sum(sum(file.supervised) for file in files)
        lost = supervised - sum(sum(file.kept) for file in files)
        tiles += [(_short(tokens), "tokens"), (f"{supervised / max(tokens, 1):.1%}", "of them trained on")]
        if report.max_seq_length is not None:
            cut = f"lost to max_seq_length {report.max_seq_length:,}"
            tiles.append((f"{lost / max(supervised, 1):.1%}", cut))
    shown = "".join(
        f'<div class="tile"><b>{value}</b><span>{escape(name)}</span></div>' for value, name in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _files(files: Sequence[FileFacts]) -> str:
    rows = [
        (
            f"<code>{_shown(file.name, 120)}</code>",
            escape(file.container + ("" if file.encoding == "utf-8" else f", {file.encoding}")),
            escape(NAMES.get(file.format or "", "unknown")),
            f"{file.rows + file.unread:,}",
            f"{file.bad_rows:,}",
            _size(file.size),
        )
        for file in files
    ]
    return _table(("file", "kind", "format", "rows", "with errors", "size"), rows, numbers={3, 4, 5})


def _problems(report: Report) -> str:
    cards = []
    for kind, level, count in report.kinds():
        listed = [finding for finding in report.findings if finding.kind == kind][:LISTED]
        items = []
        for finding in listed:
            field = f' <code class="soft">{_shown(finding.field, 80)}</code>' if finding.field else ""
            sample = f'<pre class="soft">{_shown(finding.sample, 240)}</pre>' if finding.sample else ""
            items.append(
                f'<div class="item"><code>{_shown(finding.place, 160)}</code>{field}<br>'
                f"{_shown(finding.what, 400)}{sample}</div>"
            )
        more = f'<div class="item soft">and {count - len(listed):,} more</div>' if count > len(listed) else ""
        cards.append(
            f'<details><summary><span class="tag {level}">{level}</span>'
            f'<b>{escape(KINDS[kind].title)}</b><code class="soft">{kind}</code>'
            f'<span class="number">{count:,}</span>'
            f'<span class="soft small">{escape(KINDS[kind].fix)}</span></summary>{"".join(items)}{more}</details>'
        )
    return f'<div class="card list">{"".join(cards)}</div>'


def _lengths(report: Report) -> str:
    cards = []
    for file in report.files:
        if file.tokens:
            cards.append(_histogram(f"{file.name}: tokens of a row", file.tokens, report.max_seq_length))
        if file.characters:
            cards.append(_histogram(f"{file.name}: characters of a row", file.characters, None))
    return (
        f'<div class="grid">{"".join(cards)}</div>' if cards else '<p class="soft">No row could be read.</p>'
    )


def _histogram(title: str, values: Sequence[int], limit: int | None) -> str:
    """Bars over a logarithmic axis where lengths span more than a factor of 20, over a linear one otherwise."""
    ordered = sorted(values)
    low, high = max(ordered[0], 1), max(ordered[-1], 2)
    logarithmic = high > 20 * low
    edges = _edges(low, high, logarithmic)
    counts = [0] * (len(edges) - 1)
    at = 0
    for value in ordered:
        while at < len(counts) - 1 and value >= edges[at + 1]:
            at += 1
        counts[at] += 1
    median, p95 = ordered[len(ordered) // 2], ordered[min(int(len(ordered) * 0.95), len(ordered) - 1)]
    facts = f"median {median:,}, 95 % up to {p95:,}, longest {ordered[-1]:,}"
    return (
        f'<div class="card"><h3>{_shown(title, 120)}</h3><p class="soft small">{facts}</p>'
        f"{_bars(edges, counts, limit, logarithmic)}</div>"
    )


def _edges(low: int, high: int, logarithmic: bool) -> list[float]:
    if not logarithmic:
        step = max((high - low + 1) / BINS, 1)
        return [low + step * i for i in range(math.ceil((high - low + 1) / step) + 1)]
    factor = ((high + 1) / low) ** (1 / BINS)
    return [low * factor**i for i in range(BINS + 1)]


def _bars(edges: list[float], counts: list[int], limit: int | None, logarithmic: bool) -> str:
    width, height, foot, most = 640, 150, 20, max(counts)
    low, high = edges[0], edges[-1]

    def x(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return max(min(share, 1.0), 0.0) * width

    parts = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            tall = max(height * count / most, 1.5)
            cut = " cut" if limit is not None and left >= limit else ""
            last = max(math.ceil(right) - 1, math.ceil(left))
            told = f"{math.ceil(left):,} to {last:,}: {count:,} row{'' if count == 1 else 's'}"
            parts.append(
                f'<rect class="bar{cut}" x="{x(left) + 0.5:.1f}" y="{height - tall:.1f}" rx="1.5" '
                f'width="{max(x(right) - x(left) - 1, 1):.1f}" height="{tall:.1f}">'
                f"<title>{told}</title></rect>"
            )
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>')
    for tick in _ticks(low, high, logarithmic):
        anchor = "start" if x(tick) < 20 else "end" if x(tick) > width - 20 else "middle"
        parts.append(
            f'<text x="{x(tick):.1f}" y="{height + 15}" text-anchor="{anchor}">{_short(tick)}</text>'
        )
    if limit is not None and low < limit < high:
        parts.append(f'<line class="limit" x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="0" y2="{height}"/>')
        anchor = "end" if x(limit) > width / 2 else "start"
        shift = -5 if anchor == "end" else 5
        parts.append(
            f'<text x="{x(limit) + shift:.1f}" y="11" text-anchor="{anchor}">max_seq_length {limit:,}</text>'
        )
    return f'<svg viewBox="0 0 {width} {height + foot}" role="img">{"".join(parts)}</svg>'


def _ticks(low: float, high: float, logarithmic: bool) -> list[int]:
    """Round numbers inside the range, six or so."""
    if logarithmic:
        decades = [10**k * m for k in range(16) for m in (1, 2, 5)]
        inside = [tick for tick in decades if low <= tick <= high]
        return inside[:: max(-(-len(inside) // 8), 1)]
    rough = (high - low) / 6
    power = 10 ** max(math.floor(math.log10(max(rough, 1))), 0)
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step) * step
    return [int(first + step * i) for i in range(int((high - first) / step) + 1)]


def _samples(file: FileFacts) -> str:
    if not file.samples:
        return ""
    rows: list[str] = []
    for at, texts in file.samples:
        fields = "".join(
            f'<div class="field">{_shown(name, 80)}</div><pre>{_lines(text)}</pre>' for name, text in texts
        )
        place = "row" if file.container == "Parquet" else "line"
        opened = " open" if not rows else ""
        rows.append(
            f'<details class="card"{opened}><summary><b>{place} {at:,}</b></summary>{fields}</details>'
        )
    return f'<h3>{_shown(file.name, 120)}</h3><div style="margin: 8px 0 20px">{"".join(rows)}</div>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: set[int]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if index in numbers else ''}>{cell}</{tag}>"
            for index, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="card scroll"><table><tr>{cells(columns, "th")}</tr>{body}</table></div>'


def _shown(text: str, limit: int) -> str:
    """A text of the data on one line of the page."""
    return escape(visible(text, limit))


def _lines(text: str) -> str:
    """The same with its line ends."""
    return "\n".join(escape(visible(line, 1000)) for line in text.split("\n"))


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _short(count: int) -> str:
    """1,234 or 12k or 3.4M."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= limit:
            scaled = count / (1000 if unit == "k" else limit)
            return f"{scaled:.0f}{unit}" if scaled >= 100 or scaled == int(scaled) else f"{scaled:.1f}{unit}"
    return f"{count:,}"
