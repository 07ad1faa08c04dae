"""A layer of a long row, by tiles and groups of heads, gives what it gives at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pronghorn.blocks import head_groups, long_rows
from pronghorn.engine import TrainingStep, binding_of
from pronghorn.engine.binding import Binding
from tests.families.parity import (
    add_adapter,
    add_second_adapter,
    assert_same,
    bound_copy,
    packed_batch,
    quantise_4bit,
    relative_error,
    rows_batch,
    run,
    run_step,
)
from tests.tiny import tiny_model

EXACT = 5e-6  # as in the family tests: fp64 models, RMSNorm's statistics in fp64, the loss's sums in fp64
LENGTHS = (100, 7, 120, 90)


@pytest.fixture(params=[False, True])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Short rows count as long ones, without and with q, k and v made again by groups of heads; of how many rows the
    layers were that went this way backwards."""
    monkeypatch.setattr(long_rows, "SCARCE_TILES", 128 if request.param else 0)
    monkeypatch.setattr(Binding, "attention_backend", lambda self, *args, **kwargs: "eager")
    monkeypatch.setattr(head_groups, "GROUP_TOKENS", 64)
    went: list[int] = []
    backward = long_rows.backward

    def counted(layer: Any, dout: Any, x: Any, *rest: Any) -> Any:
        went.append(x.shape[0])
        return backward(layer, dout, x, *rest)

    monkeypatch.setattr(long_rows, "backward", counted)
    return went


def outcome(
    model: Any, batch: Any, long_input: int, monkeypatch: pytest.MonkeyPatch, level: str = "offload"
) -> Any:
    monkeypatch.setattr(long_rows, "LONG_INPUT", long_input)
    fast = bound_copy(model, level)
    binding_of(fast).tile_rows = 128  # type: ignore[union-attr]
    torch.manual_seed(0)
    return run(fast, batch, logits=False)


def compare(
    model: Any, monkeypatch: pytest.MonkeyPatch, level: str = "offload", exact: float = EXACT
) -> None:
    batch = packed_batch(rows_batch(model.config.vocab_size, LENGTHS))
    expected = outcome(model, batch, 2**40, monkeypatch, level)
    assert_same(outcome(model, batch, 0, monkeypatch, level), expected, exact)


@pytest.mark.parametrize(
    "family, level",
    [("llama", "none"), *((name, "offload") for name in ("phi3", "mistral", "ministral3", "qwen3"))],
)
def test_same_gradients(family: str, level: str, split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"sliding_window": 40} if family == "mistral" else {}
    compare(add_adapter(tiny_model(family, dtype=torch.float64, **options)), monkeypatch, level)
    assert split and set(split) == {sum(LENGTHS)}


@pytest.mark.parametrize("kind", ["nf4", "two adapters", "adapters' biases"])
def test_other_projections(kind: str, split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = tiny_model("qwen2", dtype=torch.float64), {}
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        model = quantise_4bit(model.float(), double_quant=True)
    elif kind == "adapters' biases":
        options = {"lora_bias": True}
    model = add_adapter(model, **options)
    if kind == "two adapters":
        add_second_adapter(model, target_modules=["q_proj", "o_proj", "up_proj"])
    compare(model, monkeypatch, exact=EXACT if kind != "nf4" else 1e-4)
    assert split


@pytest.mark.parametrize("kind", ["dropout", "norms of outputs", "16 bits"])
def test_others_go_the_usual_way(kind: str, split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are functions of a row's number, and gradients in 16 bits would be rounded at every tile."""
    family = {"norms of outputs": "gemma2"}.get(kind, "llama")
    model = tiny_model(family, dtype=torch.float64)
    model = add_adapter(model, lora_dropout=0.3 if kind == "dropout" else 0.0)
    if kind == "16 bits":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    compare(model, monkeypatch, exact=0.0)
    assert not split


def test_a_gradient_that_a_hook_may_read_is_not_written_over(
    split: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_rows, "LONG_INPUT", 0)
    model = bound_copy(add_adapter(tiny_model("llama", dtype=torch.float64)), "offload")
    seen: list[torch.Tensor] = []
    layer = model.get_base_model().model.layers[1]
    layer.register_full_backward_hook(lambda module, dx, dy: seen.extend((*dx, *dy)))
    run(model, packed_batch(rows_batch(model.config.vocab_size, LENGTHS)), logits=False)
    assert split and seen[0].data_ptr() != seen[1].data_ptr()
    assert not torch.equal(seen[0], seen[1])


def test_a_step_of_static_shape(split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters side by side, whose gradients are added to what is there."""
    rows = rows_batch(300, LENGTHS)
    found = []
    for long_input in (2**40, 0):
        monkeypatch.setattr(long_rows, "LONG_INPUT", long_input)
        model = bound_copy(add_adapter(tiny_model("llama", dtype=torch.float64)), "offload")
        binding_of(model).tile_rows = 128  # type: ignore[union-attr]
        found.append(run_step(TrainingStep(model.train()), model, rows))
    assert_same(found[1], found[0], EXACT)
    assert split


def test_16_bits_are_as_near_to_the_truth(split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    truth = add_adapter(tiny_model("llama", dtype=torch.float64))
    batch = packed_batch(rows_batch(truth.config.vocab_size, LENGTHS))
    expected = run(bound_copy(truth), batch, logits=False).gradients
    low = copy.deepcopy(truth)
    for name, parameter in low.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data.bfloat16()
    errors = []
    for long_input in (2**40, 0):
        actual = outcome(low, batch, long_input, monkeypatch).gradients
        errors.append(sum(relative_error(actual[name], g) ** 2 for name, g in expected.items()) ** 0.5)
    assert split and errors[1] < 1.05 * errors[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("scarce", [False, True])
def test_on_a_gpu(family: str, scarce: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its kernels, its attention and what waits on the host."""
    monkeypatch.setattr(head_groups, "GROUP_TOKENS", 128)
    monkeypatch.setattr(long_rows, "SCARCE_TILES", 128 if scarce else 0)
    model = add_adapter(tiny_model(family, hidden_size=256, head_dim=64)).to("cuda", torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    batch = packed_batch(rows_batch(model.config.vocab_size, LENGTHS))
    batch = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in batch.items()}
    found = [outcome(model, batch, long_input, monkeypatch) for long_input in (2**40, 0)]
    assert_same(found[1], found[0], 0.02)
