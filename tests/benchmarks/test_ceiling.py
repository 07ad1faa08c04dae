"""The ceiling's arithmetic, and the command on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import ceiling
from benchmarks.ceiling import Bench, Group, Product, batch_of, ceilings, parts_of, products_of
from benchmarks.kernels import sizes_of
from benchmarks.models import CONFIGS
from benchmarks.registry import WORKLOADS, find_side
from benchmarks.run import CEILING_PREFIX


def test_products_are_the_models_weights() -> None:
    """Summed over layers, and with the head, they are its parameters but for norms, biases and a second embedding."""
    for name, published in (("llama-3.1-8b", 8_030_261_248), ("qwen2.5-1.5b", 1_543_714_304)):
        sizes, layers = sizes_of(name), CONFIGS[name]["num_hidden_layers"]
        whole = [group[0] for group in products_of(sizes).values()]
        parts = [part for group in products_of(sizes).values() for part in (group[1:] or group)]
        count = sum(p.outputs * p.inputs for p in whole)
        assert count == sum(p.outputs * p.inputs for p in parts)
        embeddings = sizes.vocabulary * sizes.hidden * (1 if CONFIGS[name]["tie_word_embeddings"] else 2)
        assert layers * count + embeddings == pytest.approx(published, rel=1e-3)


def test_sums() -> None:
    groups = {
        "qkv": Group(1.0, 2.0), "o": Group(3.0, 4.0), "gate_up": Group(5.0, 6.0), "down": Group(7.0, 8.0)
    }  # fmt: skip
    parts = parts_of(groups, (0.5, 1.5, "flash"), head=9.0, layers=10)
    assert parts.forward == 160.0
    assert parts.backward == 200.0 - 2.0, "the first layer's q, k, v need no input gradient"
    assert parts.total == 160 + 198 + 5 + 15 + 9
    assert parts.gate_up == 50.0
    assert parts.rebuilt == 160 - 70 + 5
    (kind, label, speed), (_, gate_up_label, slower), (*_, slowest) = ceilings(parts, "exact", 387)
    assert (kind, label, speed) == ("16-bit products", "exact", pytest.approx(1000.0))
    assert gate_up_label != label, "only the ceiling without rebuilding is what sides are held to"
    assert speed > slower > slowest


def test_batches() -> None:
    fixed = batch_of(WORKLOADS["llama8b-lora"], find_side("pronghorn"))
    assert (fixed.tokens, fixed.supervised) == (8192, 8188)
    mixed = batch_of(WORKLOADS["alpaca"], find_side("pronghorn"))
    assert 4096 - 2048 < mixed.tokens <= 4096
    assert 0.3 < mixed.supervised / mixed.tokens < 0.8


def test_layouts() -> None:
    """Both directions run with the weight as it is stored, and their rate counts 2 T in out operations."""
    bench = Bench(16, torch.device("cpu"), torch.float32, 1e-4)
    for backward in (False, True):
        rate = bench.product(Product("up", 24, 8), backward)
        assert rate.tflops == pytest.approx(2 * 16 * 24 * 8 / rate.ms / 1e9)


def test_command(capsys) -> None:
    assert ceiling.main(["--workload", "tiny", "--device", "cpu", "--seconds", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "rebuilding gate and up costs" in out
    line = next(line for line in out.splitlines() if line.startswith(CEILING_PREFIX))
    found = json.loads(line[len(CEILING_PREFIX) :])
    assert found[0][1] == "exact"
    assert len(found) == 3
