"""Cause, fix and example of every error code, in English and Chinese: what `pronghorn explain` prints and the documents
docs/errors.md and docs/errors.zh-CN.md are written from."""

from pronghorn.diagnostics.explanations import answers, models, rows, runs
from pronghorn.diagnostics.explanations.parts import Explanation

EXPLANATIONS: dict[str, Explanation] = {
    **models.EXPLANATIONS,
    **rows.EXPLANATIONS,
    **runs.EXPLANATIONS,
    **answers.EXPLANATIONS,
}

__all__ = ["EXPLANATIONS", "Explanation"]
