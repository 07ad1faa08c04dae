"""The doctor reports what is there, and prints it both ways."""

import json

from pronghorn.cli.main import main
from pronghorn.diagnostics import doctor


def test_facts():
    report = doctor.report()
    versions = {item.name: item.version for item in report.packages}
    assert versions["torch"]
    assert not report.missing
    assert {"compute dtype", "Triton kernels", "packed attention", "model families"} <= {
        p.name for p in report.paths
    }
    assert all(item.reason for item in report.paths)
    assert "Llama" in next(item.value for item in report.paths if item.name == "model families")


def test_a_missing_package_is_reported(monkeypatch):
    def version(name):
        if name == "trl":
            raise doctor.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    report = doctor.report()
    assert [item.name for item in report.missing] == ["trl"]


def test_table(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "transformers" in text
    assert "compute dtype" in text


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["hardware"]["device"] in ("cpu", "cuda")
    assert {item["name"] for item in facts["packages"]} >= {"torch", "trl"}
