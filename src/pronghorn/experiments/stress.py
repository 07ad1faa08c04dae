"""How much a held-out score moves when labels are wrong, beside how much it moves by itself from seed to seed.

The same short training is run with shares of the answers replaced by those of other rows, for several seeds each. A
seed decides the adapter's beginning, the order of the rows, and which rows are wrong; at every share the seeds are the
same, so that runs are compared in pairs.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer

from pronghorn.data.collator import documents_of
from pronghorn.data.rows import IGNORED
from pronghorn.errors import DatasetUnusable
from pronghorn.experiments.short_runs import short_trainer
from pronghorn.training import SFTTrainer
from pronghorn.training.report.samples import held_out_rows


@dataclass(frozen=True)
class Score:
    """One training's outcome on the held-out rows.

    Args:
        share: of the training rows, whose answers are wrong.
        wrong: how many rows that are.
        loss, accuracy: per supervised token of the held-out rows.
    """

    share: float
    seed: int
    wrong: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Level:
    """All seeds at one share of wrong answers; `shift` is the mean difference of each seed's loss to its clean one."""

    share: float
    wrong: int
    loss: float
    spread: float
    accuracy: float
    shift: float
    shift_spread: float


@dataclass(frozen=True)
class StressReport:
    """The outcome of a series; the first level is the clean one."""

    scores: tuple[Score, ...]
    steps: int
    rows: int
    held_out: int

    @property
    def levels(self) -> list[Level]:
        clean = {score.seed: score.loss for score in self.scores if score.share == 0.0}
        found = []
        for share in dict.fromkeys(score.share for score in self.scores):
            scores = [score for score in self.scores if score.share == share]
            losses = [score.loss for score in scores]
            shifts = [score.loss - clean[score.seed] for score in scores]
            found.append(
                Level(
                    share,
                    round(statistics.mean(score.wrong for score in scores)),
                    statistics.mean(losses),
                    _spread(losses),
                    statistics.mean(score.accuracy for score in scores),
                    statistics.mean(shifts),
                    _spread(shifts),
                )
            )
        return found

    def sentences(self) -> list[str]:
        """What wrong answers do, beside the seeds."""
        clean, *others = self.levels
        if len(self.scores) == len(self.levels):
            # Of one seed alone nothing varies.
            moves = [
                f"{level.share:.0%} wrong answers move it by {level.shift:+.4f} ({level.shift / clean.loss:+.1%})."
                for level in others
            ]
            return ["One seed does not tell how much the held-out loss varies by itself.", *moves]
        said = [
            f"By itself the held-out loss varies by {clean.spread:.4f} (standard deviation of "
            f"{len([s for s in self.scores if s.share == 0.0])} seeds)."
        ]
        for level in others:
            times = abs(level.shift) / clean.spread if clean.spread else float("inf")
            moved = "raise" if level.shift > 0 else "lower"
            said.append(
                f"{level.share:.0%} wrong answers {moved} it by {abs(level.shift):.4f} "
                f"({abs(level.shift) / clean.loss:.1%}), "
                + ("less than that." if times < 1 else f"{times:.1f} times that.")
            )
        return said

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "rows": self.rows,
            "held_out_rows": self.held_out,
            "levels": [vars(level) for level in self.levels],
            "runs": [vars(score) for score in self.scores],
            "sentences": self.sentences(),
        }


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def stress(
    trainer: SFTTrainer,
    *,
    shares: Sequence[float] = (0.1, 0.2),
    seeds: Sequence[int] = (0, 1, 2),
    on_score: Callable[[Score], None] | None = None,
) -> StressReport:
    """Train once for every seed and share, the clean rows first; the model ends with the weights it came with.

    Args:
        trainer: of a short training, with rows to train on and held-out ones. Each run has its model, loaded once, and
            its arguments; what these say of evaluating, saving and reporting has no effect.
        on_score: is told each outcome as it comes.

    Raises:
        DatasetUnusable: a stream, no held-out rows, rows without prompts, or all with the same answer.
    """
    rows, held_out = _documents(trainer.train_dataset), held_out_rows(trainer)
    if held_out is None:
        raise DatasetUnusable("there are no held-out rows to score on", fix="give an eval_dataset")
    # Rows that cannot be wrong are refused before the clean ones are trained on.
    swap_answers(rows, max(shares, default=0.0), seeds[0])
    start = _Start(trainer.model)
    scores = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for share in (0.0, *(share for share in shares if share > 0)):
                for seed in seeds:
                    wrong = swap_answers(rows, share, seed)
                    start.begin(seed)
                    run = short_trainer(
                        trainer.model,
                        trainer.processing_class,
                        wrong.rows,
                        held_out,
                        trainer.args,
                        folder,
                        seed=seed,
                        data_seed=seed,
                    )
                    run.train()
                    metrics = run.evaluate()
                    scores.append(
                        Score(
                            share,
                            seed,
                            wrong.count,
                            metrics["eval_loss"],
                            metrics["eval_mean_token_accuracy"],
                        )
                    )
                    if on_score is not None:
                        on_score(scores[-1])
    finally:
        start.restore()
    return StressReport(tuple(scores), run.state.global_step, len(rows), len(held_out))


def _documents(rows: Any) -> Dataset:
    """Prepared rows one document each: a packed row's documents have answers of their own."""
    if not isinstance(rows, Dataset):
        raise DatasetUnusable("a stream of rows cannot be trained on again and again", fix="give a Dataset")
    documents = [document for row in rows for document in documents_of(row)]
    return Dataset.from_dict(
        {
            "input_ids": [document.ids.tolist() for document in documents],
            "labels": [document.labels.tolist() for document in documents],
        }
    )


class _Start:
    """The weights that every run begins with, put back as they were at the end."""

    def __init__(self, model: Any) -> None:
        self._trained = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        # A's random beginning is part of a seed; an adapter that was trained before begins where it is.
        self._anew = all(not b.weight.any() for layer in self._layers for b in layer.lora_B.values()) and all(
            config.init_lora_weights is True for config in getattr(model, "peft_config", {}).values()
        )

    def begin(self, seed: int) -> None:
        self.restore()
        if self._anew:
            torch.manual_seed(seed)
            for layer in self._layers:
                for name in layer.lora_A:
                    layer.reset_lora_parameters(name, True)

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, value in self._trained.items():
                parameter.copy_(value)
                parameter.grad = None


@dataclass(frozen=True)
class Swapped:
    """Rows, `count` of which have another row's answer."""

    rows: Dataset
    count: int


def swap_answers(rows: Dataset, share: float, seed: int) -> Swapped:
    """Token rows of which a share, chosen by the seed, has the answer of a row that answers otherwise.

    An answer is what follows from the first supervised token of a row on. With the same seed, rows that are wrong at a
    share are wrong at a larger one, too.

    Raises:
        DatasetUnusable: rows without prompts, or all with the same answer.
    """
    count = round(share * len(rows))
    if not count:
        return Swapped(rows, 0)
    ids, labels = rows["input_ids"], rows["labels"]
    starts = [next((at for at, label in enumerate(row) if label != IGNORED), len(row)) for row in labels]
    if all(start <= 1 for start in starts):
        raise DatasetUnusable(
            "these rows are text without prompts, so that no answer of theirs can be wrong",
            fix="give chat, prompt/completion or Alpaca rows, trained on their answers only",
        )
    answers = [tuple(row[start:]) for row, start in zip(ids, starts, strict=True)]
    if len(set(answers)) < 2:
        raise DatasetUnusable("all rows have the same answer", fix="give rows with different answers")
    draw = random.Random(seed)
    order = draw.sample(range(len(rows)), len(rows))
    made_ids, made_labels = list(ids), list(labels)
    for at in order[:count]:
        other = at
        while answers[other] == answers[at]:
            other = draw.choice(order)
        made_ids[at] = [*ids[at][: starts[at]], *ids[other][starts[other] :]]
        made_labels[at] = [*labels[at][: starts[at]], *labels[other][starts[other] :]]
    return Swapped(Dataset.from_dict({"input_ids": made_ids, "labels": made_labels}), count)
