"""Advice on settings, each with its formula, its source and where it fails.

The rules are starting points that others measured; `pronghorn lr-find` measures on the model and rows at hand.
Sources: "LoRA Without Regret" (Schulman and Thinking Machines Lab, thinkingmachines.ai/blog/lora, 2025) and the
supervised sweep of the tinker-cookbook; the others are named where they are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

WITHOUT_REGRET = "LoRA Without Regret (Schulman, Thinking Machines, 2025)"
#: The published fit: full fine-tuning's rate at this hidden size, and how it falls with it, by family.
BASE_RATE, BASE_HIDDEN = 5e-5, 2000
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
LORA_FACTOR, SHORT_FACTOR, SHORT_STEPS = 10.0, 1.5, 100
#: The scale α/r that the fit was made with, times r.
PUBLISHED_ALPHA = 32
#: Supervised tokens of a step at which the fit is taken as it is, and the most that the batch changes it.
BASE_TOKENS, MOST_BATCH = 16_384, 1.5
#: Steps that a run should have, the most passes over the same rows, rows of a batch.
FEWEST_STEPS, MOST_EPOCHS = 200, 3
SMALLEST_BATCH, LARGEST_BATCH = 4, 32
RANKS = (16, 32, 64, 128, 256)
WARMUP_SHARE, MOST_WARMUP = 0.03, 100


@dataclass(frozen=True)
class Facts:
    """What the rules need to know.

    Args:
        model_type: Transformers' name of the architecture.
        hidden: width of the model.
        rank_parameters: adapter elements of rank 1, on all linear layers.
        rows: of the data, with `tokens` and `supervised` tokens on average.
        adapters: False for full fine-tuning.
        rank, alpha, rslora, batch, epochs, steps: as somebody chose them, None for what is advised.
    """

    model_type: str
    hidden: int
    rank_parameters: int
    rows: int
    tokens: float
    supervised: float
    adapters: bool = True
    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    batch: int | None = None
    epochs: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Advice:
    """One setting by its name in `SFTConfig` or `get_peft_model`; the rule with its numbers, its source, its limits."""

    name: str
    value: Any
    rule: str
    source: str
    fails: str


def advise(facts: Facts) -> list[Advice]:
    """Advice on everything that has a rule, in the order in which one follows from the other."""
    batch, epochs = batch_rows(facts), passes(facts)
    found = [epochs, batch]
    steps = facts.steps or math.ceil(facts.rows * epochs.value / batch.value)
    rank = adapter_rank(facts) if facts.adapters else None
    if rank is not None:
        found += [rank, adapter_alpha(facts, rank.value), adapter_modules()]
    return [
        learning_rate(facts, batch.value, steps, rank.value if rank else None),
        *found,
        warm_up(steps),
        schedule(),
    ]


def learning_rate(facts: Facts, batch: int, steps: int, rank: int | None) -> Advice:
    """η = 5e-5 · M · (2000/H)^P · √(B/16k) · (32/r)/s: M of the method, P of the family, B supervised tokens a step,
    s the adapter's scale."""
    family, exponent = _exponent(facts.model_type)
    rate = BASE_RATE * (BASE_HIDDEN / facts.hidden) ** exponent
    rule = f"5e-5 · (2000/{facts.hidden})^{exponent:g} for {family}"
    if facts.adapters:
        rate *= LORA_FACTOR
        rule += " · 10 for LoRA"
        if steps < SHORT_STEPS:
            rate *= SHORT_FACTOR
            rule += f" · 1.5 as {steps} steps are few"
    tokens = batch * facts.supervised
    of_batch = min(max(math.sqrt(tokens / BASE_TOKENS), 1 / MOST_BATCH), MOST_BATCH)
    rate *= of_batch
    rule += (
        f" · {of_batch:.2g} for {tokens:,.0f} supervised tokens a step (√ of a share of 16,384; 0.67 to 1.5)"
    )
    if rank is not None:
        alpha = facts.alpha or PUBLISHED_ALPHA
        scale = alpha / math.sqrt(rank) if facts.rslora else alpha / rank
        rate *= PUBLISHED_ALPHA / rank / scale
        if not math.isclose(scale, PUBLISHED_ALPHA / rank):
            rule += f" · (32/{rank})/{scale:.3g} for the adapter's scale"
    return Advice(
        "learning_rate",
        float(f"{rate:.2g}"),
        rule,
        f"{WITHOUT_REGRET}: width, method, short runs, no dependence on rank; batch: the square root rule for Adam "
        "(Malladi et al., 2022)",
        "families other than Llama and Qwen are taken as Llama; the optimum is a factor of 3 wide and moves with the "
        "rows; measured on 1 to 70 billion parameters: below, extrapolated",
    )


def _exponent(model_type: str) -> tuple[str, float]:
    known = next((name for name in EXPONENTS if name in model_type.lower()), None)
    if known is None:
        return f"Llama, as which {model_type} is taken", EXPONENTS["llama"]
    return known.capitalize(), EXPONENTS[known]


def batch_rows(facts: Facts) -> Advice:
    """Rows of an optimizer step: enough steps first, then fewer launches."""
    if facts.batch is not None:
        return Advice("batch", facts.batch, "as chosen", "you", "")
    wanted = facts.rows * MOST_EPOCHS / FEWEST_STEPS
    batch = min(max(1 << max(int(math.log2(max(wanted, 1))), 0), SMALLEST_BATCH), LARGEST_BATCH)
    return Advice(
        "batch",
        batch,
        f"the power of two that leaves {FEWEST_STEPS} steps in {MOST_EPOCHS} passes over {facts.rows:,} rows, "
        f"{SMALLEST_BATCH} to {LARGEST_BATCH}",
        f"{WITHOUT_REGRET}: LoRA loses more than full fine-tuning where batches are large; the floor of steps is ours",
        "very noisy rows want larger batches (McCandlish et al., 2018: the useful size grows as the loss falls)",
    )


def passes(facts: Facts) -> Advice:
    """Epochs: until there are enough steps, at most a few."""
    if facts.epochs is not None:
        return Advice("num_train_epochs", facts.epochs, "as chosen", "you", "")
    smallest = facts.batch or batch_rows(facts).value
    epochs = min(max(math.ceil(FEWEST_STEPS * smallest / max(facts.rows, 1)), 1), MOST_EPOCHS)
    return Advice(
        "num_train_epochs",
        epochs,
        f"passes until there are {FEWEST_STEPS} steps, at most {MOST_EPOCHS}",
        "repeated data is nearly as good as new up to about 4 passes (Muennighoff et al., 2023, pre-training); the "
        "floor of steps is ours",
        "held-back loss rises earlier on narrow rows: keep rows back and stop there",
    )


def adapter_rank(facts: Facts) -> Advice:
    """The smallest rank whose adapter has as many elements as the data has supervised tokens."""
    if facts.rank is not None:
        return Advice("r", facts.rank, "as chosen", "you", "")
    tokens = facts.rows * facts.supervised
    needed = tokens / facts.rank_parameters
    rank = next((one for one in RANKS if one >= needed), RANKS[-1])
    return Advice(
        "r",
        rank,
        f"adapter elements ≥ supervised tokens: {tokens:,.0f} / {facts.rank_parameters:,} a rank = {needed:.1f}, so "
        f"{rank} of {', '.join(map(str, RANKS))}",
        f"{WITHOUT_REGRET}: an adapter keeps up with full fine-tuning until its capacity is used up, about a token an "
        "element",
        "style and format need less; where 256 is not enough, full fine-tuning learns more",
    )


def adapter_alpha(facts: Facts, rank: int) -> Advice:
    """α of the scale α/r."""
    if facts.alpha is not None:
        return Advice("lora_alpha", facts.alpha, "as chosen", "you", "")
    return Advice(
        "lora_alpha",
        PUBLISHED_ALPHA,
        f"32 at every rank: the scale 32/{rank} makes the best rate nearly the same at every rank",
        WITHOUT_REGRET,
        "with rsLoRA (α/√r; Kalajdzievski, 2023) the scale is larger by √r, and the rate has to be as much lower",
    )


def adapter_modules() -> Advice:
    """Where adapters go."""
    return Advice(
        "target_modules",
        "all-linear",
        "all linear layers of attention and MLP",
        f"{WITHOUT_REGRET}, and QLoRA (Dettmers et al., 2023): attention alone learns less, also at equal size",
        "with very little memory the MLP alone is nearly as good",
    )


def warm_up(steps: int) -> Advice:
    """Steps over which the rate rises."""
    count = min(max(round(WARMUP_SHARE * steps), 2), MOST_WARMUP)
    return Advice(
        "warmup_steps",
        count,
        f"3 % of {steps:,} steps, 2 to {MOST_WARMUP}",
        "the share that Stanford Alpaca (2023) and QLoRA (Dettmers et al., 2023) trained with; an adapter starts at "
        "B = 0, so that its first steps are small by themselves",
        "full fine-tuning at a high rate may need more",
    )


def schedule() -> Advice:
    """How the rate falls."""
    return Advice(
        "lr_scheduler_type",
        "linear",
        "linearly to zero over the run",
        "Defazio et al., 2023, and Bergsma et al., 2025: linear decay to zero is best or near it at a fixed budget",
        "a run that may be prolonged wants a constant rate with a decay at its end",
    )
