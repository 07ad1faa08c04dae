"""A learning-rate test as one SVG file: every batch's change of loss, the smoothed curve, the advised rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 36, 46
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1c2330}.soft{fill:#5c6470}.grid{stroke:#dfe3e8}"
    ".dots{fill:#b0622a;opacity:.35}.curve{fill:none;stroke:#b0622a;stroke-width:2.5}"
    ".rate{stroke:#2563a8;stroke-width:2;stroke-dasharray:6 4}.page{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e8ebef}.soft{fill:#a9b2bf}.grid{stroke:#333a45}.page{fill:#14181f}"
    ".dots{fill:#e8a06a}.curve{stroke:#e8a06a}.rate{stroke:#79b0f0}}"
)

_Place = Callable[[float], float]


def chart(rates: Sequence[float], changes: Sequence[float], smooth: Sequence[float], advised: float) -> str:
    """The SVG's text. Changes above the highest smoothed one by as much again are drawn at the edge."""
    shown = [value for value in smooth if math.isfinite(value)]
    low, high = min(*shown, 0.0), max(*shown, 0.0)
    room = 0.5 * (high - low) or 1.0
    low, high = low - room, high + room

    def x(rate: float) -> float:
        share = math.log(rate / rates[0]) / math.log(rates[-1] / rates[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(change: float) -> float:
        share = (min(max(change, low), high) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    dots = [
        f'<circle class="dots" cx="{x(rate):.1f}" cy="{y(change):.1f}" r="2.5"/>'
        for rate, change in zip(rates, changes, strict=True)
        if math.isfinite(change)
    ]
    points = " ".join(f"{x(rate):.1f},{y(value):.1f}" for rate, value in zip(rates, smooth, strict=False))
    at = x(advised)
    anchor = "end" if at > WIDTH * 0.6 else "start"
    parts = [
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        *_grid(rates, low, high, x, y),
        *dots,
        f'<polyline class="curve" points="{points}"/>',
        f'<line class="rate" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
        f'<text x="{at + (-8 if anchor == "end" else 8):.1f}" y="{TOP + 14}" text-anchor="{anchor}">'
        f"advised: {advised:.2g}</text>",
        f'<text x="{LEFT}" y="20">Change of the batch\'s loss against before the test, by learning rate</text>',
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="learning-rate test, advised {advised:.2g}"><style>{_STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _grid(rates: Sequence[float], low: float, high: float, x: _Place, y: _Place) -> list[str]:
    """Lines and labels at powers of ten, and at four heights."""
    parts = []
    for power in range(math.ceil(math.log10(rates[0]) - 1e-9), math.floor(math.log10(rates[-1]) + 1e-9) + 1):
        at = x(10.0**power)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="soft" x="{at:.1f}" y="{HEIGHT - 22}" text-anchor="middle">1e{power}</text>'
        )
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(m * step for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    for k in range(math.ceil(low / step), math.floor(high / step) + 1):
        at = y(k * step)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="soft" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{k * step:+.2g}</text>'
        )
    return parts
