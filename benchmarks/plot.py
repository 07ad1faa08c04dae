"""One picture of a results file: tokens/s and peak reserved memory by workload and side, as an SVG.

    python -m benchmarks.plot benchmarks/results/FILE.csv docs/images/benchmarks.svg --workloads llama8b-lora,…

Written by hand: no plotting library. Colours change with the reader's light or dark theme. A speed without a claim
(parity red or not checked) is drawn hollow.
"""

from __future__ import annotations

import argparse
import csv
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from xml.sax.saxutils import escape

WIDTH, LEFT, GAP, RIGHT = 960, 208, 36, 24
ROW, BAR, HEAD, TITLE = 22, 13, 34, 66
#: characters of a line below
FOOTNOTE = 130

STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de }
  text { font-family: -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; font-size: 12px; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 }
  .head { font-size: 13px; font-weight: 600 }
  .quiet { fill: #59636e }
  .strong { font-weight: 600 }
  .ours { fill: #b45309; stroke: #b45309 }
  .fast { fill: #dc7a1e; stroke: #dc7a1e }
  .base { fill: #57708c; stroke: #57708c }
  .peer { fill: #a9b8c9; stroke: #a9b8c9 }
  rect.hollow { fill: none; stroke-width: 1.5; stroke-dasharray: 3 2 }
  .track { fill: #eef1f4 }
  .ceiling { stroke: #1f2328; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #30363d }
    text { fill: #e6edf3 }
    .quiet { fill: #9198a1 }
    .ours { fill: #f0a04b; stroke: #f0a04b }
    .fast { fill: #ffc27d; stroke: #ffc27d }
    .base { fill: #7d97b5; stroke: #7d97b5 }
    .peer { fill: #47566a; stroke: #47566a }
    .track { fill: #161b22 }
    .ceiling { stroke: #e6edf3 }
  }
"""

TITLES = {
    "llama8b-lora": "Llama-3.1-8B, LoRA, 4×2048",
    "llama8b-qlora": "Llama-3.1-8B, QLoRA, 2×2048",
    "qwen1.5b-lora": "Qwen2.5-1.5B, LoRA, 2×1024",
    "qwen1.5b-lora-4x2048": "Qwen2.5-1.5B, LoRA, 4×2048",
    "qwen1.5b-qlora": "Qwen2.5-1.5B, QLoRA, 2×1024",
    "qwen1.5b-qlora-4x2048": "Qwen2.5-1.5B, QLoRA, 4×2048",
    "alpaca": "Llama-3.1-8B, LoRA, Alpaca's lengths",
    "alpaca-1.5b": "Qwen2.5-1.5B, LoRA, Alpaca's lengths",
}
SIDES = {
    "hf": "Transformers + PEFT",
    "hf-nockpt": "Transformers, no checkpointing",
    "liger": "Liger",
    "unsloth": "Unsloth",
    "unsloth-tuned": "Unsloth, no checkpointing",
    "unsloth-packing": "Unsloth, packing",
}


@dataclass(frozen=True)
class Bar:
    """One side of one workload: median tokens/s of its rounds, peak reserved GiB, whether the speed is a claim."""

    side: str
    tokens_per_s: float
    gib: float
    ratio: float | None
    claimed: bool
    #: tokens/s that the machine's measured rates allow at this side's precision
    ceiling: float | None = None

    @property
    def name(self) -> str:
        return SIDES.get(self.side) or self.side.replace("pronghorn-", "pronghorn, ").replace(
            "fp8-", "FP8, "
        ).replace("fp8", "FP8").replace("int8-", "INT8, ").replace("int8", "INT8")

    @property
    def kind(self) -> str:
        """The class of its colour."""
        if self.side.startswith("pronghorn"):
            return "fast" if "fp8" in self.side or "int8" in self.side else "ours"
        return "base" if self.side == "unsloth" else "peer"


def read_bars(path: Path, workloads: list[str] | None, sides: list[str] | None) -> dict[str, list[Bar]]:
    """Bars by workload, in the file's order or the given ones; failed sides and ceilings are left out."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["error"] and row["ms_per_step"]]
    names = workloads or list(dict.fromkeys(row["workload"] for row in rows))
    found: dict[str, list[Bar]] = {}
    for workload in names:
        own = [row for row in rows if row["workload"] == workload]
        order = sides or list(dict.fromkeys(row["side"] for row in own))
        groups = {side: [row for row in own if row["side"] == side] for side in order}
        bars = [_bar(side, group) for side, group in groups.items() if group]
        if bars:
            found[workload] = bars
    return found


def _bar(side: str, rows: list[dict[str, str]]) -> Bar:
    ratios = [float(row["ratio"]) for row in rows if row["ratio"]]
    ceilings = [float(r["tokens_per_s"]) / float(r["of_ceiling"]) for r in rows if r.get("of_ceiling")]
    return Bar(
        side,
        median(float(row["tokens_per_s"]) for row in rows),
        max(float(row["peak_reserved_gib"]) for row in rows),
        median(ratios) if ratios else None,
        bool(ratios),
        median(ceilings) if ceilings and side.startswith("pronghorn") else None,
    )


def draw(groups: dict[str, list[Bar]], title: str, footnote: str) -> str:
    """The whole picture."""
    plot = (WIDTH - LEFT - GAP - RIGHT - 140) / 2
    lines = textwrap.wrap(footnote, FOOTNOTE)
    height = TITLE + sum(HEAD + ROW * len(bars) for bars in groups.values()) + 24 + 16 * len(lines)
    middle = LEFT + plot + GAP + 100
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        f'<text class="title" x="20" y="28">{escape(title)}</text>',
        f'<text class="quiet" x="{LEFT}" y="54">tokens a second (ratio to Unsloth)</text>',
        f'<text class="quiet" x="{middle}" y="54">peak reserved GiB</text>',
    ]
    y = TITLE
    for workload, bars in groups.items():
        parts.append(
            f'<text class="head" x="20" y="{y + 18}">{escape(TITLES.get(workload, workload))}</text>'
        )
        y += HEAD - 6
        most = max(max(bar.tokens_per_s, bar.ceiling or 0.0) for bar in bars)
        largest = max(bar.gib for bar in bars) or 1.0
        for bar in bars:
            parts += _row(bar, y, plot, middle, 1 / most, bar.gib / largest)
            y += ROW
        y += 6
    for number, line in enumerate(reversed(lines)):
        parts.append(f'<text class="quiet" x="20" y="{height - 14 - 16 * number}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _row(bar: Bar, y: float, plot: float, middle: float, unit: float, memory: float) -> list[str]:
    """One side: `unit` is the share of the plot's width that one token a second takes."""
    length = max(1.0, plot * unit * bar.tokens_per_s)
    top = LEFT + plot * unit * (bar.ceiling or 0.0)
    tick = f'<line class="ceiling" x1="{top:.1f}" x2="{top:.1f}" y1="{y - 2}" y2="{y + BAR + 2}"/>'
    kind = bar.kind if bar.claimed else f"{bar.kind} hollow"
    end = middle + max(1.0, plot * 0.8 * memory)
    strong = " strong" if bar.side.startswith("pronghorn") else ""
    speed = f"{bar.tokens_per_s:,.0f}" + (f"  ({bar.ratio:.2f}×)" if bar.ratio is not None else "")
    middle_of_text = y + BAR - 2
    return [
        f'<text class="label{strong}" x="{LEFT - 10}" y="{middle_of_text}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>',
        f'<text class="{strong.strip()}" x="{max(LEFT + length, top) + 8:.1f}" y="{middle_of_text}">{speed}</text>',
        f'<rect class="{bar.kind}" x="{middle}" y="{y}" width="{end - middle:.1f}" height="{BAR}" rx="2"/>',
        f'<text x="{end + 8:.1f}" y="{middle_of_text}">{bar.gib:.1f}</text>',
        *([tick] if bar.ceiling else []),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--workloads", help="comma-separated, in this order")
    parser.add_argument("--sides", help="comma-separated, in this order")
    parser.add_argument(
        "--title", default="LoRA and QLoRA fine-tuning, one NVIDIA H200, all sides in one job"
    )
    parser.add_argument(
        "--footnote", default="Longer is faster on the left; shorter is smaller on the right."
    )
    options = parser.parse_args(argv)
    chosen = [names.split(",") if names else None for names in (options.workloads, options.sides)]
    groups = read_bars(options.results, *chosen)
    if not groups:
        raise SystemExit(f"{options.results} has no result of these workloads and sides")
    bars = [bar for group in groups.values() for bar in group]
    footnote = options.footnote
    if not all(bar.claimed for bar in bars):
        footnote += " Hollow: the comparison with Transformers was not recorded for exactly these sources."
    if any(bar.ceiling for bar in bars):
        footnote += " A tick: what the machine's measured rates allow at most."
    options.picture.write_text(draw(groups, options.title, footnote), encoding="utf-8")
    print(f"{options.picture}: {sum(map(len, groups.values()))} bars")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
