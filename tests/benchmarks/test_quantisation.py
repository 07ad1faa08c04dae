"""benchmarks.quantisation on a tiny model; the real one takes half an hour."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import quantisation
from benchmarks.quantisation import VARIANTS, compared, measure, table
from pronghorn.data.docstrings import DocRow
from tests.tiny import save_tiny


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny model is compared on the CPU")
def test_fitted_bits_are_nearer_and_the_table_has_every_variant(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(quantisation, "LENGTH", 64)
    rows = [DocRow(f"module.name{i}", f"What does name{i} do?", f"It counts to {i * 7}.") for i in range(200)]
    monkeypatch.setattr("pronghorn.data.docstrings.docstring_rows", lambda: rows)
    model = save_tiny(tmp_path / "tiny", "llama")
    names = ["plain NF4, double quantisation", "plain NF4, adapter for the outputs", "extra=0"]
    found = measure(str(model), {}, names, tokens=512)
    plain, adapted, fitted = (found[name]["docstrings"] for name in names)
    assert fitted["kl"] < plain["kl"] and adapted["kl"] < plain["kl"] and 0 < fitted["same"] <= 1
    kept = {name: {kind: {"kl": 1.0, "same": 0.5} for kind in ("docstrings", "prose")} for name in names}
    assert measure(str(model), dict(kept), names, tokens=512) == kept
    lines = table(found).splitlines()
    assert len(lines) == 5 and lines[-1].startswith("| `extra=0` | ")
    page = (quantisation.DOCS / "quantisation.md").read_text(encoding="utf-8")
    for line in table(dict.fromkeys(VARIANTS, kept[names[0]])).splitlines()[2:]:
        assert line.split("|")[1] in page


def test_a_model_beside_itself() -> None:
    logs = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert compared(logs, logs) == {"kl": 0.0, "same": 1.0}
    assert compared(logs, logs.flip(-1))["kl"] > 0
