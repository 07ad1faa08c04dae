"""What dynamic quantisation found and did, module by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pronghorn.quantising.formats import Format
from pronghorn.quantising.held_out import Predictions
from pronghorn.quantising.measure import Errors

HEADER = ("module", "weight error", "output error", "harm", "MiB", "stored as", "output error then")


@dataclass(frozen=True)
class ModuleReport:
    """One linear module, or a stack of experts.

    Args:
        harm: estimated KL in nats a token that plain NF4 would cost here (`measure`).
        before: errors of plain NF4. after: errors of what is stored.
    """

    name: str
    shape: tuple[int, int]
    form: Format
    harm: float
    before: Errors
    after: Errors

    @property
    def nbytes(self) -> int:
        return self.form.nbytes(self.shape)

    def cells(self) -> list[str]:
        """A line of the table that `HEADER` heads."""
        return [
            self.name,
            f"{self.before.weight:.2e}",
            f"{self.before.output:.2e}",
            f"{self.harm:.1e}",
            f"{self.nbytes / 2**20:.2f}",
            str(self.form),
            f"{self.after.output:.2e}",
        ]


@dataclass(frozen=True)
class Report:
    """All modules of a model.

    Args:
        plain: the form they are compared with.
        tokens: that they were measured on.
        predictions: on rows held out; None where the data had no more.
    """

    modules: Sequence[ModuleReport]
    plain: Format
    tokens: int
    predictions: Predictions | None
    seconds: float

    @property
    def nbytes(self) -> int:
        return sum(module.nbytes for module in self.modules)

    @property
    def plain_nbytes(self) -> int:
        return sum(self.plain.nbytes(module.shape) for module in self.modules)

    def worst_first(self) -> list[ModuleReport]:
        """Modules by the harm that plain NF4 would do."""
        return sorted(self.modules, key=lambda module: -module.harm)

    def __str__(self) -> str:
        forms = Counter(str(module.form) for module in self.modules)
        shown = ", ".join(f"{count} as {form}" for form, count in forms.most_common())
        before, after = (
            sum(errors.output for errors in found) / len(self.modules)
            for found in ([m.before for m in self.modules], [m.after for m in self.modules])
        )
        return (
            f"{len(self.modules)} weights in {self.nbytes / 2**20:,.1f} MiB ({shown}), "
            f"{self.plain_nbytes / 2**20:,.1f} as plain {self.plain}; mean output error {before:.2e} → {after:.2e}, "
            f"measured on {self.tokens:,} tokens in {self.seconds:.0f} s"
            + (
                ""
                if self.predictions is None
                else f"; to the original: {self.predictions.fitted} (plain: {self.predictions.plain})"
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bytes": self.nbytes,
            "plain_bytes": self.plain_nbytes,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "predictions": None if self.predictions is None else asdict(self.predictions),
            "modules": [
                {
                    "name": module.name,
                    "shape": list(module.shape),
                    "stored_as": str(module.form),
                    "bytes": module.nbytes,
                    "harm": module.harm,
                    "before": asdict(module.before),
                    "after": asdict(module.after),
                }
                for module in self.modules
            ],
        }
