"""The gates of quantised modes, on a tiny model: they pass what is close, and fail what is not."""

import pytest
import torch

from benchmarks import gates
from tests.tiny import save_tiny

SMALL = ["--steps", "3", "--seeds", "2", "--batch", "2", "--length", "48"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("gates") / "llama", "llama", num_hidden_layers=4))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    from pronghorn import hardware
    from pronghorn.loading import fast

    monkeypatch.setattr(fast, "probe", hardware._cpu_hardware)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def verdicts(text: str) -> dict[str, str]:
    table = text.split("verdict\n")[1]
    lines = [line.rstrip() for line in table.splitlines()]
    return {line.split("  ")[0]: line.split()[-1] for line in lines if line.endswith(("green", "RED"))}


def test_backward_alone_is_green_and_recorded(model, capsys, monkeypatch):
    pytest.importorskip("bitsandbytes")
    written = {}
    monkeypatch.setattr(gates, "record", lambda kind, cases: written.update({kind: cases}))
    arguments = ["--mode", "fp8-backward", "--model", model, "--skip-layers", "1", "--record", *SMALL]
    status = gates.main(arguments)
    found = verdicts(capsys.readouterr().out)
    judged = {name: verdict for name, verdict in found.items() if "paired" not in name}
    # Three steps are too few for the spread over seeds to mean anything.
    assert set(judged.values()) == {"green"} and len(judged) == 8, found
    assert status == (0 if "RED" not in found.values() else 1)
    assert len(written["fp8"]) == len(found)


def test_int8_is_green(model, capsys):
    pytest.importorskip("bitsandbytes")
    assert gates.main(["--mode", "int8", "copies=1", "--model", model, "--no-training", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "int8 int8_copies=1: green" in text and len(verdicts(text)) == 6
    with pytest.raises(SystemExit, match="no setting"):
        gates.main(["--mode", "int8", "copies=many", "--model", model])


def test_a_wrong_scale_is_red(model, capsys, monkeypatch):
    from pronghorn.weights import fp8_linear

    right = fp8_linear.quantise_weight

    def wrong(weight, *, rowwise=True):
        codes, scales = right(weight, rowwise=rowwise)
        return codes.flip(0), scales

    monkeypatch.setattr(fp8_linear, "quantise_weight", wrong)
    arguments = ["--mode", "fp8", "--model", model, "--skip-layers", "1", "--no-training", *SMALL]
    assert gates.main(arguments) == 1
    found = verdicts(capsys.readouterr().out)
    assert found["gradient cosine, fp8 to fp32"] == "RED"
