"""The result of a check as one HTML page: no script, no font, no picture from elsewhere, light and dark.

Every text from the data goes through `shown` or `html.escape`; the page's own policy forbids all but its style sheet.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pronghorn.data.checks.formats import NAMES
from pronghorn.data.checks.report import FileFacts, Report
from pronghorn.data.reading import KINDS
from pronghorn.errors import CommandMisused
from pronghorn.pages import document, lines, short, shown, size, table, tiles, write_whole

#: Problems of one kind on the page.
LISTED = 50
BINS = 36

_STYLE = """
svg { display: block; width: 100%; height: auto; margin-top: 8px; } svg text { fill: var(--soft); font-size: 11px; }
.bar { fill: var(--bar); } .bar.cut { fill: var(--bar-soft); } .axis { stroke: var(--line); }
.limit { stroke: var(--mark); stroke-dasharray: 4 3; }
"""


def write_check(report: Report, path: Path) -> Path:
    """Write the page; a file in its place is replaced, a folder is not.

    Raises:
        CommandMisused: it cannot be written.
    """
    read = {os.path.realpath(file.name) for file in report.files}
    if os.path.realpath(path) in read:
        raise CommandMisused(f"'{path}' is a file that was checked", fix="name another file with --html")
    try:
        write_whole(page(report), path)
    except OSError as error:
        raise CommandMisused(
            f"the page '{path}' cannot be written: {error.strerror}", fix="name another file with --html"
        ) from None
    return path


def page(report: Report) -> str:
    """The page as text."""
    names = ", ".join(file.name for file in report.files)
    body = [
        f"<h1>{shown(names, 200)}</h1>",
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
    return document(f"{names}: data check", body, style=_STYLE)


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
    facts = [
        (f"{sum(file.rows + file.unread for file in files):,}", "rows"),
        (f"{sum(file.bad_rows for file in files):,}", "rows with errors"),
        (
            size(sum(file.size for file in files)),
            "in " + (f"{len(files)} files" if len(files) > 1 else "one file"),
        ),
    ]
    if report.measured:
        tokens = sum(sum(file.tokens) for file in files)
        supervised = sum(sum(file.supervised) for file in files)
        lost = supervised - sum(sum(file.kept) for file in files)
        facts += [(short(tokens), "tokens"), (f"{supervised / max(tokens, 1):.1%}", "of them trained on")]
        if report.max_seq_length is not None:
            cut = f"lost to max_seq_length {report.max_seq_length:,}"
            facts.append((f"{lost / max(supervised, 1):.1%}", cut))
    return tiles(facts)


def _files(files: Sequence[FileFacts]) -> str:
    rows = [
        (
            f"<code>{shown(file.name, 120)}</code>",
            escape(file.container + ("" if file.encoding == "utf-8" else f", {file.encoding}")),
            escape(NAMES.get(file.format or "", "unknown")),
            f"{file.rows + file.unread:,}",
            f"{file.bad_rows:,}",
            size(file.size),
        )
        for file in files
    ]
    return table(("file", "kind", "format", "rows", "with errors", "size"), rows, numbers={3, 4, 5})


def _problems(report: Report) -> str:
    cards = []
    for kind, level, count in report.kinds():
        listed = [finding for finding in report.findings if finding.kind == kind][:LISTED]
        items = []
        for finding in listed:
            field = f' <code class="soft">{shown(finding.field, 80)}</code>' if finding.field else ""
            sample = f'<pre class="soft">{shown(finding.sample, 240)}</pre>' if finding.sample else ""
            items.append(
                f'<div class="item"><code>{shown(finding.place, 160)}</code>{field}<br>'
                f"{shown(finding.what, 400)}{sample}</div>"
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
        f'<div class="card"><h3>{shown(title, 120)}</h3><p class="soft small">{facts}</p>'
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
        parts.append(f'<text x="{x(tick):.1f}" y="{height + 15}" text-anchor="{anchor}">{short(tick)}</text>')
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
            f'<div class="field">{shown(name, 80)}</div><pre>{lines(text)}</pre>' for name, text in texts
        )
        place = "row" if file.container == "Parquet" else "line"
        opened = " open" if not rows else ""
        rows.append(
            f'<details class="card"{opened}><summary><b>{place} {at:,}</b></summary>{fields}</details>'
        )
    return f'<h3>{shown(file.name, 120)}</h3><div style="margin: 8px 0 20px">{"".join(rows)}</div>'
