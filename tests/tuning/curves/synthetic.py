"""Made-up histories: healthy ones of many kinds, and faults planted into them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pronghorn.tuning.curves import Curve, History


def schedule(kind: str, count: int, peak: float = 2e-4, warmup: int = 10) -> np.ndarray:
    """Rates of steps 1 … count."""
    at = np.arange(count)
    rising = np.minimum((at + 1) / max(warmup, 1), 1.0)
    share = np.clip((at - warmup) / max(count - warmup, 1), 0, 1)
    falling = {"constant": 1.0 + 0 * share, "linear": 1 - share, "cosine": 0.5 * (1 + np.cos(np.pi * share))}[
        kind
    ]
    return peak * rising * falling


def descent(count: int, *, first: float = 2.4, last: float = 1.5, power: float = 0.5) -> np.ndarray:
    """A loss that falls quickly, then ever more slowly, as those of fine-tuning do."""
    at = np.arange(count)
    return last + (first - last) * (1 + at / (count / 40)) ** -power


def healthy(seed: int, **options: Any) -> History:
    """A run without a fault; its length, noise, schedule and evaluations are drawn from the seed."""
    random = np.random.default_rng(seed)
    count = int(options.get("count") or random.choice([60, 150, 400, 1000]))
    sigma = float(options.get("sigma") or random.choice([0.01, 0.04, 0.1, 0.25]))
    kind = str(options.get("kind") or random.choice(["constant", "linear", "cosine"]))
    clean = options.get("clean")
    if clean is None:
        clean = descent(
            count, first=random.uniform(1.5, 4), last=random.uniform(0.5, 1.4), power=random.uniform(0.3, 0.8)
        )
    # Batches differ by factors, not by sums: a logarithm's noise is normal, with a few harder ones.
    noise = np.exp(sigma * random.standard_normal(count) - sigma**2 / 2)
    noise *= np.where(random.random(count) < 0.02, np.exp(2 * sigma), 1.0)
    loss = clean * noise
    norms = random.uniform(0.3, 3) * (clean / clean[0]) ** 0.5 * np.exp(0.3 * random.standard_normal(count))
    evaluated = np.unique(np.linspace(0, count - 1, 9).astype(int)[1:])
    evaluation = (clean[evaluated] + 0.08) * np.exp(0.002 * random.standard_normal(len(evaluated)))
    return history(loss, norms=norms, rates=schedule(kind, count), evaluations=(evaluated + 1, evaluation))


def history(
    loss: np.ndarray,
    *,
    norms: np.ndarray | None = None,
    rates: np.ndarray | None = None,
    evaluations: tuple[np.ndarray, np.ndarray] | None = None,
    **known: Any,
) -> History:
    """From the values of steps 1, 2, …"""
    steps = np.arange(1, len(loss) + 1)
    return History(
        loss=Curve(steps, np.asarray(loss, dtype=float)),
        grad_norm=Curve(steps, np.ones(len(loss)) if norms is None else norms),
        rate=Curve(steps, schedule("constant", len(loss)) if rates is None else rates),
        evaluations={} if evaluations is None else {"eval_loss": Curve(*evaluations)},
        **{"max_steps": len(loss), "max_grad_norm": 1.0, "steps_per_epoch": len(loss) / 3, **known},
    )
