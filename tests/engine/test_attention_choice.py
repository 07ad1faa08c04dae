"""The attention that a model was asked to run: checked when it is bound, used by every layer, said by `describe`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.blocks import attention as block
from pronghorn.engine import bind, binding_of
from pronghorn.engine import binding as binding_module
from pronghorn.errors import AttentionUnavailable
from pronghorn.loading import FastLanguageModel
from tests.families.parity import relative_error, rows_batch, run
from tests.tiny import save_tiny, tiny_model

#: One layer with a window and one without.
HALF_WINDOWED = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}


def used(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[tuple[str, int | None]]:
    """The implementation and window of each layer in a forward pass."""
    calls = []

    def forward(q: Any, k: Any, v: Any, docs: Any, call: Any) -> Any:
        calls.append((call.backend, call.window))
        return plain(q, k, v, docs, call)

    plain = block.attention_forward
    monkeypatch.setattr(block, "attention_forward", forward)
    with torch.no_grad():
        model.train()(**rows_batch(model.config.vocab_size, (7, 9)))
    return calls


@pytest.mark.parametrize("name", ["sdpa", "eager", "cpu"])
def test_every_layer_runs_what_was_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    binding = bind(model, attention=name)
    assert binding.attention == name
    assert f"attention: {name} (" in binding.describe() and "as asked for" in binding.describe()
    assert {backend for backend, _ in used(monkeypatch, model)} == {name}


def test_choices_agree() -> None:
    outcomes = {}
    for name in ("eager", "cpu"):
        model = tiny_model("mistral", sliding_window=5)
        model.requires_grad_(True)
        bind(model, attention=name)
        outcomes[name] = run(model, rows_batch(model.config.vocab_size, (7, 9)))
    for name, gradient in outcomes["eager"].gradients.items():
        assert relative_error(outcomes["cpu"].gradients[name], gradient) < 1e-5, name


def test_a_wrong_name_is_refused_before_anything_is_bound() -> None:
    model = tiny_model("llama")
    with pytest.raises(AttentionUnavailable, match="flashh") as refusal:
        bind(model, attention="flashh")
    assert "flash" in str(refusal.value.fix)
    assert binding_of(model) is None and "forward" not in model.__dict__


@pytest.mark.skipif(torch.cuda.is_available(), reason="a model on the CPU may move to the GPU")
def test_what_cannot_run_here_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(AttentionUnavailable, match="it runs on CUDA GPUs, not on cpu"):
        bind(model, attention="cudnn")
    assert binding_of(model) is None
    with pytest.raises(AttentionUnavailable):
        bind(model).choose_attention("flash")
    binding = binding_of(model)
    assert binding is not None and binding.attention is None


def test_binding_again_keeps_the_choice_unless_another_is_named() -> None:
    model = tiny_model("llama")
    binding = bind(model, attention="eager")
    assert bind(model) is binding and binding.attention == "eager"
    assert bind(model, attention="sdpa") is binding and binding.attention == "sdpa"
    binding.choose_attention(None)
    assert "attention: cpu" in binding.describe()


def test_the_window_of_a_layer_takes_part_in_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation that knows no window is chosen for the layers without one alone."""

    def choose(device: Any, dtype: Any, head_dim: int, *, window: bool, **wishes: Any) -> tuple[str, str]:
        return ("eager" if window else "cpu"), "pretended"

    monkeypatch.setattr(binding_module, "choose_backend", choose)
    model = tiny_model("qwen2", **HALF_WINDOWED)
    binding = bind(model)
    assert binding.windowed() == [False, True]
    assert used(monkeypatch, model) == [("cpu", None), ("eager", 6)]
    assert "  attention: cpu (pretended)" in binding.describe()
    assert "  attention in a window: eager (pretended)" in binding.describe()


def test_from_pretrained_takes_the_choice(tmp_path: Any) -> None:
    path = save_tiny(tmp_path / "llama", "llama")
    arguments = {"dtype": "float32", "max_seq_length": 64}
    with pytest.raises(AttentionUnavailable):
        FastLanguageModel.from_pretrained(str(path), attention="sdap", **arguments)
    model, _ = FastLanguageModel.from_pretrained(str(path), attention="sdpa", **arguments)
    binding = binding_of(FastLanguageModel.get_peft_model(model, r=4))
    assert binding is not None and binding.attention == "sdpa"
