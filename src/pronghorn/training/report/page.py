"""A run as one HTML page, from its record alone. Every text of data, settings and models is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pronghorn.pages import document, duration, lines, short, shown, size, table, tiles
from pronghorn.pages.chart import CHART_SCRIPT, CHART_STYLE, Mark, Series, chart, smoothed
from pronghorn.tuning.run_record import RunRecord, Sample, Setting

_STYLE = (
    CHART_STYLE
    + """
.findings { list-style: none; margin: 0; padding: 0; } .findings li { padding: 12px 0; display: grid;
  grid-template-columns: 28px 1fr; gap: 0 10px; border-bottom: 1px solid var(--line); }
.findings li:last-child { border-bottom: 0; } .findings .label { font-weight: 700; color: var(--soft); }
.tile b { font-size: 21px; white-space: nowrap; }
.note { color: var(--soft); background: var(--page); border: 1px solid var(--line); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 0 18px; }
.settings td:first-child { white-space: nowrap; } .settings td { overflow-wrap: anywhere; }
.settings td:last-child { min-width: 90px; }
h2 + .charts { margin-top: 4px; }
@media (max-width: 560px) { .settings tr:first-child { display: none; }
  .settings tr { display: grid; grid-template-columns: 1fr auto; border-bottom: 1px solid var(--line); padding: 6px 0; }
  .settings td { border: 0; padding: 0; } .settings td:nth-child(2) { grid-column: 1 / -1; order: 3; }
  .settings td:last-child { text-align: right; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""
)
_DATA_NAMES = {
    "supervised share": "trained on",
    "median length": "median length, tokens",
    "95 % up to": "95 % up to, tokens",
    "longest": "longest, tokens",
}
_SOURCES = {"given": "given", "planned": "worked out", "default": "default"}


def report_page(record: RunRecord) -> str:
    """The page as text."""
    marks = _marks(record.findings)
    body = [
        f"<h1>{shown(record.name or 'Training run', 200)}</h1>",
        f'<p class="soft">{_verdict(record)}</p>',
        _tiles(record),
        *(["<h2>What the curves say</h2>", _findings(record)] if record.findings else []),
        "<h2>Curves</h2>",
        f'<div class="charts">{"".join(run_charts(record, marks))}</div>',
        *(["<h2>Before and after</h2>", *map(_sample, record.samples)] if record.samples else []),
        "<h2>Settings</h2>",
        _settings(record.settings),
        "<h2>Data</h2>",
        _data(record.data),
        "<h2>Model and machine</h2>",
        _model(record.model),
        _facts(record.environment),
        *(f'<p class="soft small">{shown(note, 400)}</p>' for note in record.notes),
    ]
    return document(f"{record.name}: training run", body, style=_STYLE, script=CHART_SCRIPT)


def _verdict(record: RunRecord) -> str:
    level = (
        "good" if record.state == "finished" else "error" if record.state.startswith("failed") else "warning"
    )
    model = str(record.model.get("name", ""))
    steps = int(record.last("loss") is not None and record.curve("loss")[-1][0])
    parts = [f"{steps:,} of {record.max_steps:,} steps", duration(record.seconds)]
    if record.began:
        parts.append(f"begun {record.began[:16].replace('T', ' ')} UTC")
    return (
        f'<span class="tag {level}">{shown(record.state or "unknown", 160)}</span> '
        f"<code>{shown(model, 120)}</code>, {shown(', '.join(parts), 200)}"
    )


def _tiles(record: RunRecord) -> str:
    facts = []
    for key, name in (("loss", "training loss, last logged"), ("eval_loss", "evaluation loss, last")):
        value = record.last(key)
        if value is not None:
            facts.append((_loss(value), name))
    best = [(value, step) for step, value in record.curve("eval_loss") if math.isfinite(value)]
    if len(best) > 1:
        value, step = min(best)
        facts.append((_loss(value), f"evaluation loss, best (step {step:,.0f})"))
    speed = [value for _, value in record.curve("tokens_per_second")]
    if speed:
        facts.append((f"{sorted(speed)[len(speed) // 2]:,.0f}", "tokens a second, median"))
    tokens = record.last("num_tokens")
    if tokens:
        facts.append((short(int(tokens)), "tokens trained on"))
    if record.memory:
        facts.append((_gib(max(most for *_, most in record.memory)), f"most {record.memory_of}"))
    return tiles(facts)


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "NaN"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


# --- curves -----------------------------------------------------------------------------------------------------------


def run_charts(record: RunRecord, marks: Mapping[str, Sequence[Mark]]) -> list[str]:
    """The charts of one run; `marks` by the curve they are on."""
    return [
        _loss_chart(record, [*marks.get("loss", ()), *marks.get("eval_loss", ())]),
        chart(
            "Gradient norm",
            _noisy("gradient norm", record.norms(), colour=3),
            marks=marks.get("grad_norm", ()),
            note=_span(record.norms()),
        ),
        chart(
            "Learning rate",
            [Series("learning rate", record.curve("learning_rate"), 2)],
            marks=marks.get("learning_rate", ()),
            from_zero=True,
        ),
        chart(
            "Tokens per second",
            [Series("tokens per second", record.curve("tokens_per_second"), 5)],
            from_zero=True,
        ),
        _memory_chart(record),
    ]


def _noisy(name: str, points: Sequence[tuple[float, float]], colour: int) -> list[Series]:
    """A curve of single steps: the steps faintly, their medians before them."""
    median = smoothed(points)
    if len(median) < 3 or median == list(points):
        return [Series(name, points, colour)]
    return [
        Series(f"{name}, single steps", points, colour, "faint"),
        Series(f"{name}, median", median, colour),
    ]


def _loss_chart(record: RunRecord, marks: Sequence[Mark]) -> str:
    series = _noisy("training loss", record.losses(), colour=0)
    for number, name in enumerate(record.evaluations()):
        of = name.removeprefix("eval_").removesuffix("loss").removesuffix("_")
        told = f"evaluation loss, {of}" if of else "evaluation loss"
        series.append(Series(told, record.curve(name), 1 + number, "dots"))
    evaluated, trained = record.curve("eval_loss"), record.losses()
    note = f"evaluation: {_span(evaluated)}" if evaluated else f"training: {_span(trained)}"
    return chart("Loss", series, marks=marks, note=note, wide=True)


def _memory_chart(record: RunRecord) -> str:
    now = [(float(step), held / 2**30) for step, held, _ in record.memory]
    most = [(float(step), peak / 2**30) for step, _, peak in record.memory]
    planned = record.planned_memory
    note = ""
    if planned is not None and most:
        peak = most[-1][1]
        note = f"planned {planned / 2**30:.2f} GiB, at most {peak:.2f} GiB: {peak * 2**30 / planned - 1:+.1%}"
    return chart(
        f"{record.memory_of[:1].upper()}{record.memory_of[1:]}, GiB",
        [Series("now", now, 6), Series("most so far", most, 7)],
        limit=None if planned is None else (planned / 2**30, "the plan for the largest batch"),
        note=note,
        from_zero=True,
    )


def _span(points: Sequence[tuple[float, float]]) -> str:
    finite = [y for _, y in points if math.isfinite(y)]
    return f"first {finite[0]:.4g}, last {finite[-1]:.4g}, least {min(finite):.4g}" if finite else ""


# --- words ------------------------------------------------------------------------------------------------------------


def _marks(findings: Sequence[Mapping[str, Any]]) -> dict[str, list[Mark]]:
    found: dict[str, list[Mark]] = {}
    for number, item in enumerate(findings, 1):
        mark = Mark(float(item["first"]), float(item["last"]), str(item["level"]), str(number))
        found.setdefault(str(item["curve"]), []).append(mark)
    return found


def _findings(record: RunRecord) -> str:
    items: list[str] = []
    advised: set[str] = set()
    for number, item in enumerate(record.findings, 1):
        advice = (
            ""
            if item["advice"] in advised
            else f'<br><span class="soft">{shown(str(item["advice"]), 600)}</span>'
        )
        advised.add(item["advice"])
        level = item["level"] if item["level"] in ("error", "warning") else "note"
        items.append(
            f'<li><span class="label">{number}</span><div>'
            f'<span class="tag {level}">{shown(str(item["kind"]), 40)}</span> '
            f"{shown(str(item['what']), 600)}{advice}</div></li>"
        )
    return f'<div class="card"><ul class="findings">{"".join(items)}</ul></div>'


def _sample(sample: Sample) -> str:
    parts = "".join(
        f'<div><div class="field">{name}</div><pre>{lines(text)}</pre></div>'
        for name, text in (
            ("before", sample.before),
            ("after", sample.after),
            ("in the data", sample.expected),
        )
    )
    prompt = f'<div class="field">prompt</div><pre>{lines(sample.prompt)}</pre>'
    return f'<div class="card">{prompt}<div class="answers">{parts}</div></div>'


def _settings(settings: Sequence[Setting]) -> str:
    chosen = [item for item in settings if item.source != "default"]
    others = [item for item in settings if item.source == "default"]
    parts = [_setting_rows(chosen)] if chosen else []
    if others:
        parts.append(
            f'<details class="card"><summary><b>{len(others)} defaults</b></summary>{_setting_rows(others)}</details>'
        )
    return f'<div class="settings">{"".join(parts)}</div>'


def _setting_rows(settings: Sequence[Setting]) -> str:
    rows = [
        (
            f"<code>{shown(item.name, 80)}</code>",
            f"<code>{shown(item.text, 300)}</code>",
            shown(_SOURCES.get(item.source, item.source), 20)
            + (f' <span class="soft small">{shown(item.note, 160)}</span>' if item.note else ""),
        )
        for item in settings
    ]
    return table(("setting", "value", "from"), rows)


def _data(data: Mapping[str, Mapping[str, Any]]) -> str:
    known = {name: facts for name, facts in data.items() if facts}
    if not known:
        return '<p class="soft">The data is a stream: nothing is counted before it is read.</p>'
    keys = dict.fromkeys(key for facts in known.values() for key in facts)
    rows = [
        (shown(_DATA_NAMES.get(key, key), 60), *(_count(facts.get(key), key) for facts in known.values()))
        for key in keys
    ]
    return table(("", *(shown(name, 80) for name in known)), rows, numbers=range(1, len(known) + 1))


def _count(value: Any, key: str) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:.1%}" if key == "supervised share" else f"{value:,}"


def _model(model: Mapping[str, Any]) -> str:
    if not model:
        return ""
    count, trained = int(model.get("parameters") or 0), int(model.get("trained parameters") or 0)
    told = f"{short(count)} parameters, {short(trained)} of them trained, {model.get('dtype', '')}"
    return (
        f'<div class="card"><h3>{shown(str(model.get("name", "")), 160)}</h3><p class="soft">{shown(told, 200)}</p>'
        f"<pre>{lines(str(model.get('engine', '')))}</pre></div>"
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{shown(name, 60)}",
            f"<code>{shown(size(value) if name == 'memory' and isinstance(value, int) else str(value), 200)}</code>",
        )
        for name, value in facts.items()
    ]
    return table(("what", "version or value"), rows) if rows else ""
