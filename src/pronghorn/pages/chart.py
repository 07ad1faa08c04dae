"""Curves as inline SVG that is read without a script; with one, a pointer shows values.

The drawing is stretched to the width there is; its texts are HTML beside it, so that they keep their size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pronghorn.pages.text import shown

#: Points of a drawn series; of more, the least and the greatest of each of half as many runs are drawn.
DRAWN = 900
#: A span of values that is wider than this factor is drawn on a logarithmic axis.
LOGARITHMIC = 60.0
#: Width of the window of a smoothed curve, as a share of its points.
_SMOOTHED = 1 / 25
#: Width of a label's character on a phone, in per cent of a chart's.
_CHARACTER = 2.5

CHART_STYLE = """
:root { --c0: #b0622a; --c1: #2563a8; --c2: #2c7a4b; --c3: #8a3fa0; --c4: #a8852b; --c5: #0f7f86; --c6: #b23a5e;
  --c7: #5c6470; }
@media (prefers-color-scheme: dark) { :root { --c0: #e8a06a; --c1: #79b0f0; --c2: #7fd09b; --c3: #d09be4;
  --c4: #e2c26a; --c5: #6cd0d6; --c6: #f08fac; --c7: #a9b2bf; } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 14px; }
.charts > .wide { grid-column: 1 / -1; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0; padding: 14px 16px; }
.chart figcaption { display: flex; gap: 4px 14px; flex-wrap: wrap; align-items: baseline; margin-bottom: 8px; }
.key { font-size: 13px; color: var(--soft); white-space: nowrap; max-width: 100%; overflow: hidden;
  text-overflow: ellipsis; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.key.pale i { opacity: .4; }
.plot { position: relative; height: 190px; margin: 0 0 22px 52px; touch-action: pan-y; }
.wide .plot { height: 250px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot span { position: absolute; color: var(--soft); font-size: 12px; line-height: 1; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.plot .y { right: 100%; padding-right: 8px; transform: translateY(-50%); }
.plot .x { top: 100%; padding-top: 7px; transform: translateX(-50%); }
.plot .x.first { transform: none; } .plot .x.last { transform: translateX(-100%); }
.plot .told { top: -2px; font-weight: 600; transform: translateX(-50%); color: var(--text); }
.plot svg * { vector-effect: non-scaling-stroke; }
.plot .gridline { stroke: var(--line); stroke-width: 1; }
.plot polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.plot .faint { stroke-width: 1; opacity: .38; }
.plot .dots { stroke-width: 6; stroke-linecap: round; }
.plot .limit { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 5 4; }
.plot .band { opacity: .16; } .plot .mark { stroke-width: 1.5; opacity: .75; }
.plot .cursor { stroke: var(--soft); stroke-width: 1; visibility: hidden; }
.readout { min-height: 20px; margin: 0; color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.readout b { color: var(--text); font-weight: 600; }
""" + "".join(
    f".s{n} {{ stroke: var(--c{n}); }} .key .b{n} {{ background: var(--c{n}); }}\n" for n in range(8)
)

#: Shows the values beneath a pointer, out of the series' own attributes. Nothing of it comes from data.
CHART_SCRIPT = """
for (const figure of document.querySelectorAll('figure[data-low]')) {
  const plot = figure.querySelector('.plot'), cursor = figure.querySelector('.cursor');
  const readout = figure.querySelector('.readout'), before = readout.textContent;
  const low = +figure.dataset.low, high = +figure.dataset.high, name = figure.dataset.x;
  const series = [...figure.querySelectorAll('[data-points]')].map(line => ({name: line.dataset.name,
    points: line.dataset.points.split(' ').map(pair => pair.split(',').map(Number))}));
  const at = x => low + (high - low) * x;
  const told = value => Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2)
    : String(+value.toPrecision(4));
  for (const kind of ['pointermove', 'pointerdown']) plot.addEventListener(kind, event => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1), x = at(share);
    readout.textContent = '';
    let nearest = null;
    for (const {points} of series) for (const [step] of points)
      if (nearest === null || Math.abs(step - x) < Math.abs(nearest - x)) nearest = step;
    if (nearest === null) return;
    const shown = high > low ? 1000 * (nearest - low) / (high - low) : 500;
    cursor.setAttribute('x1', shown); cursor.setAttribute('x2', shown); cursor.style.visibility = 'visible';
    readout.append(name + ' ' + nearest.toLocaleString('en'));
    for (const {name, points} of series) {
      let best = points[0];
      for (const point of points) if (Math.abs(point[0] - nearest) < Math.abs(best[0] - nearest)) best = point;
      if (Math.abs(best[0] - nearest) > (high - low) / 20) continue;
      const value = document.createElement('b');
      value.textContent = told(best[1]);
      readout.append('  ·  ' + name + ' ', value);
    }
  });
  plot.addEventListener('pointerleave', () => { cursor.style.visibility = 'hidden'; readout.textContent = before; });
}
"""


@dataclass(frozen=True)
class Series:
    """A curve: (x, y) with rising x; a y that is not finite leaves a gap.

    Args:
        colour: one of eight.
        style: "line", "faint" (single values behind a smoothed line), or "dots" (a line with its points marked).
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    style: str = "line"


@dataclass(frozen=True)
class Mark:
    """A stretch of x that is told about elsewhere on the page, under `label`."""

    first: float
    last: float
    level: str
    label: str


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str = "step",
    note: str = "",
    marks: Sequence[Mark] = (),
    limit: tuple[float, str] | None = None,
    from_zero: bool = False,
    wide: bool = False,
) -> str:
    """One figure, or an empty text where no series has a finite value.

    Args:
        note: what is read without a pointer; plain text.
        limit: a height with its name, such as what was planned.
    """
    kept = [item for item in series if any(math.isfinite(y) for _, y in item.points)]
    if not kept:
        return ""
    xs = [point[0] for item in kept for point in item.points]
    ys = [y for item in kept for _, y in item.points if math.isfinite(y)]
    if limit is not None:
        ys.append(limit[0])
    across, up = _Axis(min(xs), max(xs)), _axis(ys, from_zero)
    parts = [
        f'<line class="gridline" x1="0" x2="1000" y1="{up.down(tick):.1f}" y2="{up.down(tick):.1f}"/>'
        for tick in up.ticks()
    ]
    texts = [
        f'<span class="y" style="top:{up.down(tick) / 10:.1f}%">{_number(tick)}</span>' for tick in up.ticks()
    ]
    texts += [_x_label(across, tick) for tick in across.ticks(6, whole=True)]
    parts += [_mark(across, mark) for mark in marks]
    texts += _labels(across, marks)
    if limit is not None:
        height = up.down(limit[0])
        parts.append(f'<line class="limit" x1="0" x2="1000" y1="{height:.1f}" y2="{height:.1f}"/>')
    parts += [_drawn(item, across, up) for item in kept]
    parts.append('<line class="cursor" x1="0" x2="0" y1="0" y2="1000"/>')
    keys = [
        f'<span class="key{" pale" if item.style == "faint" else ""}"><i class="b{item.colour % 8}"></i>'
        f"{shown(item.name, 80)}</span>"
        for item in kept
        if len(kept) > 1
    ]
    if limit is not None:
        keys.append(f'<span class="key">┄ {shown(limit[1], 80)}</span>')
    return (
        f'<figure class="chart{" wide" if wide else ""}" data-low="{_exact(across.low)}" '
        f'data-high="{_exact(across.high)}" data-x="{shown(x, 40)}">'
        f"<figcaption><h3>{shown(title, 120)}</h3>{''.join(keys)}</figcaption>"
        f'<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{shown(title, 120)}">{"".join(parts)}</svg>{"".join(texts)}</div>'
        f'<p class="readout">{shown(note, 300)}</p></figure>'
    )


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` along 1,000 units."""

    low: float
    high: float
    logarithmic: bool = False

    def along(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return 1000 * (value - low) / (high - low) if high > low else 500.0

    def down(self, value: float) -> float:
        return 1000 - self.along(value)

    def ticks(self, most: int = 5, whole: bool = False) -> list[float]:
        """Round numbers inside."""
        if self.high <= self.low:
            return [self.low]
        if self.logarithmic:
            first = math.floor(math.log10(self.low))
            last = math.ceil(math.log10(self.high))
            for factors in ((1, 2, 5), (1,)):
                found = [f * 10.0**k for k in range(first, last + 1) for f in factors]
                found = [tick for tick in found if self.low <= tick <= self.high]
                if len(found) <= most + 2:
                    return found
            return found[:: -(-len(found) // most)]
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        if whole:
            step = max(step, 1.0)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _axis(values: Sequence[float], from_zero: bool) -> _Axis:
    low, high = min(values), max(values)
    if from_zero and low >= 0:
        return _Axis(0.0, high * 1.06 or 1.0)
    if low > 0 and high > LOGARITHMIC * low:
        return _Axis(low / 1.1, high * 1.1, logarithmic=True)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return _Axis(low - room if low < 0 or low - room > 0 else 0.0, high + room)


def _drawn(item: Series, across: _Axis, up: _Axis) -> str:
    """A series as lines between gaps; the first of them carries its values for the script."""
    points = thinned(item.points)
    runs: list[list[str]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append(f"{across.along(x):.1f},{up.down(y):.1f}")
        elif runs[-1]:
            runs.append([])
    runs = [run for run in runs if run]
    classes = f"s{item.colour % 8}" + (" faint" if item.style == "faint" else "")
    values = " ".join(f"{_exact(x)},{y:.6g}" for x, y in points if math.isfinite(y))
    told = f' data-name="{shown(item.name, 80)}" data-points="{values}"'
    drawn = []
    for number, run in enumerate(runs):
        # A point alone is drawn as the round end of a line without length.
        spots = " ".join(run if len(run) > 1 else run * 2)
        dotted = " dots" if len(run) == 1 else ""
        drawn.append(f'<polyline class="{classes}{dotted}" points="{spots}"{told if number == 0 else ""}/>')
    if item.style == "dots" and len(points) <= 60:
        drawn += [
            f'<polyline class="{classes} dots" points="{spot} {spot}"/>'
            for run in runs if len(run) > 1 for spot in run
        ]  # fmt: skip
    return "".join(drawn)


def thinned(points: Sequence[tuple[float, float]], most: int = DRAWN) -> list[tuple[float, float]]:
    """At most about `most` points, none of the extremes left out."""
    if len(points) <= most:
        return list(points)
    width = -(-2 * len(points) // most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        finite = [point for point in part if math.isfinite(point[1])]
        kept += sorted({min(finite, key=_y), max(finite, key=_y)}) if finite else [part[0]]
    return kept


def smoothed(points: Sequence[tuple[float, float]], width: int | None = None) -> list[tuple[float, float]]:
    """Medians of a window around each point, which single steps do not move; few points stay as they are."""
    width = max(int(len(points) * _SMOOTHED), 5) if width is None else width
    if len(points) < 3 * width:
        return list(points)
    values = np.array([y for _, y in points], dtype=float)
    half, found = width // 2, []
    stride = max(len(points) // 600, 1)
    for at in [*range(0, len(points) - 1, stride), len(points) - 1]:
        window = values[max(at - half, 0) : at + half + 1]
        window = window[np.isfinite(window)]
        found.append((points[at][0], float(np.median(window)) if len(window) else math.nan))
    return found


def _y(point: tuple[float, float]) -> float:
    return point[1]


def _mark(across: _Axis, mark: Mark) -> str:
    left, right = _ends(across, mark)
    colour = f"var(--{mark.level if mark.level in ('error', 'warning') else 'soft'})"
    if right - left < 4:
        at = (left + right) / 2
        return f'<line class="mark" style="stroke:{colour}" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="1000"/>'
    return f'<rect class="band" style="fill:{colour}" x="{left:.1f}" width="{right - left:.1f}" y="0" height="1000"/>'


def _ends(across: _Axis, mark: Mark) -> tuple[float, float]:
    """Of a mark, as far as it is on the axis."""
    return across.along(max(mark.first, across.low)), across.along(min(mark.last, across.high))


def _labels(across: _Axis, marks: Sequence[Mark]) -> list[str]:
    """Above the middle of each mark; those that would lie upon one another are told together."""
    placed: list[tuple[float, list[str]]] = []
    for middle, label in sorted((sum(_ends(across, mark)) / 20, mark.label) for mark in marks):
        at, before = placed[-1] if placed else (-math.inf, [])
        if middle - at < _CHARACTER * (len(", ".join(before)) + len(label) + 1) / 2:
            before.append(label)
        else:
            placed.append((middle, [label]))
    return [
        f'<span class="told" style="left:{min(max(middle, 1), 99):.1f}%">{shown(", ".join(labels), 24)}</span>'
        for middle, labels in placed
    ]


def _x_label(across: _Axis, tick: float) -> str:
    share = across.along(tick) / 10
    edge = " first" if share < 3 else " last" if share > 97 else ""
    return f'<span class="x{edge}" style="left:{share:.1f}%">{tick:,.0f}</span>'


def _number(value: float) -> str:
    """A tick's value in few characters."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _exact(value: float) -> str:
    return f"{value:.10g}"
