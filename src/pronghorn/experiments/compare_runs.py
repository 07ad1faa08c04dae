"""Runs side by side: the settings that differ, what came of them, and their curves over one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pronghorn.pages import document, duration, shown, table
from pronghorn.pages.chart import CHART_SCRIPT, CHART_STYLE, Series, chart, smoothed
from pronghorn.tuning.curves import History, read_curves
from pronghorn.tuning.run_record import RunRecord

#: Where a run is kept and what it is called says nothing about it.
_OF_THE_PLACE = {
    "output_dir",
    "run_name",
    "logging_dir",
    "hub_model_id",
    "report",
    "report_samples",
    "disable_tqdm",
}
#: Tokens of two runs' steps that are alike enough to be compared step by step.
_ALIKE = 1.05


@dataclass(frozen=True)
class Figure:
    """One figure of every run, in their order; None where a run has none.

    Args:
        best: "least" or "most" where one is better than another.
    """

    name: str
    values: tuple[float | None, ...]
    form: str = ",.4g"
    best: str = ""

    def texts(self) -> list[str]:
        return [self._text(value) for value in self.values]

    def _text(self, value: float | None) -> str:
        if value is None:
            return "-"
        if not math.isfinite(value):
            return "not a number"
        return duration(value) if self.form == "duration" else format(value, self.form)

    def winner(self) -> int | None:
        """The run with the best figure, where it is better than the others' by what is shown of it."""
        known = [
            (value, at) for at, value in enumerate(self.values) if value is not None and math.isfinite(value)
        ]
        if not self.best or len(known) < 2:
            return None
        value, at = min(known) if self.best == "least" else max(known)
        return at if self.texts().count(self._text(value)) == 1 else None


@dataclass(frozen=True)
class Comparison:
    """Several runs.

    Args:
        names: distinct names of the runs.
        settings: (name, value of each run as text) where they differ, settings of the machine last.
        figures: what came of them.
        findings: of each run, what its curves show.
    """

    names: tuple[str, ...]
    records: tuple[RunRecord, ...]
    settings: tuple[tuple[str, tuple[str, ...]], ...]
    figures: tuple[Figure, ...]
    findings: tuple[tuple[str, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "runs": list(self.names),
            "settings": {name: list(values) for name, values in self.settings},
            "figures": {figure.name: [_plain(value) for value in figure.values] for figure in self.figures},
            "findings": [list(texts) for texts in self.findings],
        }


def compare(records: Sequence[RunRecord], names: Sequence[str]) -> Comparison:
    """Lay runs beside one another; `names` are what they were called by, used where their own are not distinct."""
    own = tuple(record.name for record in records)
    chosen = own if all(own) and len(set(own)) == len(own) else tuple(names)
    return Comparison(
        chosen,
        tuple(records),
        (*_differing(records), *_differing_machines(records)),
        tuple(_figures(records)),
        tuple(
            tuple(f"{found.kind}: {found.what}" for found in read_curves(History.of_record(record)))
            for record in records
        ),
    )


def _differing(records: Sequence[RunRecord]) -> list[tuple[str, tuple[str, ...]]]:
    names = dict.fromkeys(item.name for record in records for item in record.settings)
    rows = []
    for name in names:
        if name not in _OF_THE_PLACE:
            held = [next((item for item in record.settings if item.name == name), None) for record in records]
            texts = tuple("-" if item is None else item.text for item in held)
            # A run that knows no settings differs in none.
            known = {text for text, record in zip(texts, records, strict=True) if record.settings}
            if len(known) > 1:
                rows.append((name, texts))
    return rows


def _differing_machines(records: Sequence[RunRecord]) -> list[tuple[str, tuple[str, ...]]]:
    kept = [
        {
            **{f"model {key}": value for key, value in record.model.items() if key != "engine"},
            **{f"data {key}": value for key, value in record.data.get("training", {}).items()},
            **record.environment,
        }
        for record in records
    ]
    rows = []
    for name in dict.fromkeys(name for facts in kept for name in facts):
        texts = tuple(str(facts.get(name, "-")) for facts in kept)
        if len({text for text, facts in zip(texts, kept, strict=True) if facts}) > 1:
            rows.append((name, texts))
    return rows


def _figures(records: Sequence[RunRecord]) -> list[Figure]:
    def each(read: Any) -> tuple[float | None, ...]:
        return tuple(read(record) for record in records)

    figures = [
        Figure("steps", each(lambda record: _last(record.losses(), 0)), ",.0f"),
        Figure("training loss, end", each(_end_loss), ".4f", "least"),
        Figure("evaluation loss, best", each(lambda record: _best(record)[0]), ".4f", "least"),
        Figure("  at step", each(lambda record: _best(record)[1]), ",.0f"),
        Figure("evaluation loss, last", each(lambda record: record.last("eval_loss")), ".4f", "least"),
        Figure(
            "evaluation accuracy, last",
            each(lambda record: record.last("eval_mean_token_accuracy")),
            ".1%",
            "most",
        ),
        Figure(
            "tokens per second, median",
            each(lambda record: _middle(record.curve("tokens_per_second"))),
            ",.0f",
            "most",
        ),
        Figure("tokens trained on", each(lambda record: record.last("num_tokens")), ",.0f"),
        Figure("memory, most, GiB", each(_most_memory), ".2f", "least"),
        Figure("memory, planned, GiB", each(lambda record: _gib(record.planned_memory)), ".2f"),
        Figure("time", each(lambda record: record.seconds or None), "duration", "least"),
    ]
    return [figure for figure in figures if any(value is not None for value in figure.values)]


def _last(points: Sequence[tuple[float, float]], part: int) -> float | None:
    return points[-1][part] if points else None


def _end_loss(record: RunRecord) -> float | None:
    """Of single steps the median of the last twentieth, which is less a matter of luck than the last one."""
    points = record.losses()
    return _middle(points[-max(len(points) // 20, min(5, len(points))) :])


def _middle(points: Sequence[tuple[float, float]]) -> float | None:
    values = sorted(y for _, y in points if math.isfinite(y))
    return values[len(values) // 2] if values else None


def _best(record: RunRecord) -> tuple[float | None, float | None]:
    points = [(y, x) for x, y in record.curve("eval_loss") if math.isfinite(y)]
    return min(points) if points else (None, None)


def _most_memory(record: RunRecord) -> float | None:
    if record.memory:
        return _gib(max(most for *_, most in record.memory))
    logged = [y for _, y in record.curve("peak_memory_gib")]
    return max(logged) if logged else None


def _gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- the page ---------------------------------------------------------------------------------------------------------

_STYLE = CHART_STYLE + ".best { font-weight: 600; color: var(--good); }\n"


def comparison_page(comparison: Comparison) -> str:
    """One page: figures, the settings that differ, curves over one another, what each run's curves show."""
    names = [
        f'<span class="key"><i class="b{at % 8}"></i></span>{shown(name, 80)}'
        for at, name in enumerate(comparison.names)
    ]
    numbers = range(1, len(names) + 1)
    figures = [_figure_row(figure) for figure in comparison.figures]
    settings = [
        (f"<code>{shown(name, 80)}</code>", *(f"<code>{shown(text, 200)}</code>" for text in texts))
        for name, texts in comparison.settings
    ]
    body = [
        f"<h1>{shown(' / '.join(comparison.names), 200)}</h1>",
        f'<p class="soft">{len(comparison.names)} runs</p>',
        "<h2>What came of them</h2>",
        table(("", *names), figures, numbers),
        "<h2>Settings that differ</h2>",
        table(("setting", *names), settings) if settings else '<p class="soft">None that is known of.</p>',
        "<h2>Curves</h2>",
        f'<div class="charts">{"".join(_charts(comparison))}</div>',
        *_findings(comparison),
    ]
    return document(f"{' / '.join(comparison.names)}: runs compared", body, style=_STYLE, script=CHART_SCRIPT)


def _figure_row(figure: Figure) -> tuple[str, ...]:
    winner = figure.winner()
    cells = [
        f'<span class="best">{escape(text)}</span>' if at == winner else escape(text)
        for at, text in enumerate(figure.texts())
    ]
    return (escape(figure.name), *cells)


def _charts(comparison: Comparison) -> list[str]:
    runs = list(zip(comparison.names, comparison.records, strict=True))

    def overlaid(title: str, read: Any, **options: Any) -> str:
        style = options.pop("style", "line")
        series = [Series(name, read(record), at, style) for at, (name, record) in enumerate(runs)]
        return chart(title, series, **options)

    charts = [overlaid("Training loss, medians", lambda record: smoothed(record.losses()), wide=True)]
    ends = [record.last("num_tokens") for _, record in runs]
    known = [end for end in ends if end]
    if len(known) > 1 and max(known) > _ALIKE * min(known):
        charts.append(overlaid("Training loss over tokens, medians", _loss_by_tokens, x="token", wide=True))
    return [
        *charts,
        overlaid("Evaluation loss", lambda record: record.curve("eval_loss"), style="dots", wide=True),
        overlaid("Gradient norm, medians", lambda record: smoothed(record.norms())),
        overlaid("Learning rate", lambda record: record.curve("learning_rate"), from_zero=True),
        overlaid("Tokens per second", lambda record: record.curve("tokens_per_second"), from_zero=True),
        overlaid("Most memory so far, GiB", _memory, from_zero=True),
    ]


def _loss_by_tokens(record: RunRecord) -> list[tuple[float, float]]:
    points = [
        (entry["num_tokens"], entry["loss"])
        for entry in record.log
        if "num_tokens" in entry and "loss" in entry
    ]
    return smoothed(points)


def _memory(record: RunRecord) -> list[tuple[float, float]]:
    if record.memory:
        return [(float(step), most / 2**30) for step, _, most in record.memory]
    return record.curve("peak_memory_gib")


def _findings(comparison: Comparison) -> list[str]:
    parts = []
    for name, texts in zip(comparison.names, comparison.findings, strict=True):
        if texts:
            items = "".join(f"<p>{shown(text, 600)}</p>" for text in texts)
            parts.append(f'<div class="card"><h3>{shown(name, 80)}</h3>{items}</div>')
    return ["<h2>What the curves say</h2>", *parts] if parts else []
