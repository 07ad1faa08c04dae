"""What a search varies: a few settings, each over values that are listed, or the learning rate over a range."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pronghorn.errors import SearchInvalid, nearest

Settings = dict[str, Any]

#: The settings that can vary, under the names of `SFTConfig` and `get_peft_model`, with the type of their values.
KEYS: dict[str, type] = {
    "learning_rate": float,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
    "r": int,
    "lora_alpha": float,
}
#: Those that are the adapter's.
ADAPTER_KEYS = ("r", "lora_alpha")


@dataclass(frozen=True)
class Range:
    """Every value between two, drawn evenly in the logarithm."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"

    def rounded(self, value: float) -> float:
        """A value with three digits: more of them decide nothing and make a table hard to read."""
        return min(max(float(f"{value:.3g}"), self.low), self.high)


class Space:
    """Settings and their values.

    Args:
        axes: by name a list of values, or for the learning rate a `Range`. A `Range` of another setting is the powers
            of two in it.

    Raises:
        SearchInvalid: a setting that cannot vary, no values, or one that is out of bounds.
    """

    def __init__(self, axes: Mapping[str, Sequence[float] | Range]) -> None:
        if not axes:
            raise SearchInvalid("nothing varies", fix=f"give values of one of {', '.join(KEYS)}")
        self.axes = {key: _axis(key, values) for key, values in axes.items()}

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Space:
        """`learning_rate=1e-4,3e-4` or `r=4..64`, one text a setting."""
        axes: dict[str, Any] = {}
        for text in texts:
            key, sign, values = text.partition("=")
            if not sign:
                raise SearchInvalid(f"'{text}' names no values", fix="write such as r=8,16")
            if key in axes:
                raise SearchInvalid(f"'{key}' is given twice", fix="give all of its values at once")
            low, dots, high = values.partition("..")
            if dots:
                axes[key] = Range(_number(key, low), _number(key, high))
            else:
                axes[key] = [_number(key, part) for part in values.split(",") if part.strip()]
        return cls(axes)

    @property
    def size(self) -> int | None:
        """How many points there are; None for a range."""
        if any(isinstance(values, Range) for values in self.axes.values()):
            return None
        return math.prod(len(values) for values in self._lists())

    def grid(self) -> list[Settings]:
        """All points; the last setting varies fastest.

        Raises:
            SearchInvalid: a range has no end of them.
        """
        if self.size is None:
            key, values = next((key, v) for key, v in self.axes.items() if isinstance(v, Range))
            raise SearchInvalid(
                f"a grid needs values, and '{key}' is the range {values}",
                fix="list some, or take the sampler random or tpe",
            )
        return [dict(zip(self.axes, point, strict=True)) for point in itertools.product(*self._lists())]

    def drawn(self, seed: int) -> Iterator[Settings]:
        """Points in a random order, which the seed decides; without an end where there is a range."""
        if self.size is not None:
            points = self.grid()
            random.Random(seed).shuffle(points)
            yield from points
            return
        for number in itertools.count():
            draw = random.Random(f"{seed}:{number}")
            yield {
                key: _drawn(values, draw) if isinstance(values, Range) else draw.choice(values)
                for key, values in self.axes.items()
            }

    def largest(self, key: str, otherwise: Any) -> Any:
        """The highest value of a setting, or what it is where it does not vary."""
        values = self.axes.get(key)
        if values is None:
            return otherwise
        return values.high if isinstance(values, Range) else max(values)

    def as_dict(self) -> dict[str, Any]:
        return {
            key: {"low": values.low, "high": values.high} if isinstance(values, Range) else list(values)
            for key, values in self.axes.items()
        }

    def _lists(self) -> list[tuple[Any, ...]]:
        return [values for values in self.axes.values() if not isinstance(values, Range)]


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SearchInvalid(f"'{text}' is no value of '{key}'", fix="write such as r=8,16") from None


def _axis(key: str, values: Sequence[float] | Range) -> tuple[Any, ...] | Range:
    if key not in KEYS:
        raise SearchInvalid(
            f"'{key}' is no setting that a search varies",
            fix=nearest(key, KEYS) or f"it varies {', '.join(KEYS)}",
        )
    if isinstance(values, Range):
        low, high = _value(key, values.low), _value(key, values.high)
        if low >= high:
            raise SearchInvalid(f"the range {values} of '{key}' is empty", fix="give the lower end first")
        if key == "learning_rate":
            return Range(low, high)
        values = [2**power for power in range(64) if low <= 2**power <= high]
    if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not values:
        raise SearchInvalid(f"'{key}' has no values", fix="list at least one, or give a range with two ends")
    return tuple(dict.fromkeys(_value(key, value) for value in values))


def _value(key: str, value: Any) -> Any:
    """A positive number of the setting's type."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value) and value > 0:
        if KEYS[key] is float:
            return float(value)
        if value == int(value):
            return int(value)
    wanted = "a whole number from 1" if KEYS[key] is int else "a number above 0"
    raise SearchInvalid(f"'{key}' cannot be {_plain(value)}", fix=f"give {wanted}")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _drawn(values: Range, draw: random.Random) -> float:
    return values.rounded(math.exp(draw.uniform(math.log(values.low), math.log(values.high))))
