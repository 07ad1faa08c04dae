"""Hooks, replaced forwards and PEFT layers on modules that the blocks stand in for: nothing of them is lost."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from pronghorn.engine import bind, binding_of
from tests.families.parity import add_adapter, assert_same, bound_copy, relative_error, rows_batch, run
from tests.tiny import tiny_model

EXACT = 5e-6
LENGTHS = (9, 5)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """PEFT initialises from the global generator, and gradients of other draws may be worse conditioned."""
    torch.manual_seed(0)


def pair(family: str = "llama", **options: Any) -> tuple[Any, Any]:
    """A stock model with an adapter and its bound copy, both fp64."""
    model = add_adapter(tiny_model(family).double(), **options)
    return model, bound_copy(model, "none")


def scaled(module: Any, inputs: Any, output: Any) -> Any:
    return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


@pytest.mark.parametrize(
    "path",
    [
        "layers.0.self_attn",
        "layers.1.mlp",
        "layers.0.input_layernorm",
        "layers.0.mlp.act_fn",
        "layers.1.self_attn.q_norm",
        "layers.0.self_attn.q_proj.lora_B.default",
        "norm",
    ],
)
def test_forward_hooks_inside_a_layer_run(path: str, caplog: pytest.LogCaptureFixture) -> None:
    model, fast = pair("qwen3")
    for m in (model, fast):
        m.get_base_model().model.get_submodule(path).register_forward_hook(scaled)
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    assert_same(run(fast, batch), run(model, batch), EXACT)
    if "lora_B" not in path:
        assert f"{path} has hooks" in caplog.text and path in binding_of(fast).describe()


def test_backward_pre_hooks_of_a_projection_run() -> None:
    model, fast = pair()
    for m in (model, fast):
        projection = m.get_base_model().model.layers[0].mlp.up_proj
        projection.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 1.5,))
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    assert_same(run(fast, batch), run(model, batch), EXACT)


@pytest.mark.parametrize("path", ["mlp", "mlp.up_proj", "mlp.up_proj.base_layer"])
def test_a_forward_put_on_the_instance_is_called(path: str) -> None:
    model, fast = pair()
    for m in (model, fast):
        module = m.get_base_model().model.layers[0].get_submodule(path)
        module.forward = lambda x, before=module.forward: before(x) * 1.5
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    assert_same(run(fast, batch), run(model, batch), EXACT)


def test_what_a_hook_keeps_is_not_written_over() -> None:
    """RoPE and the activation's gradient are computed in place; and hooks see tokens in the second dimension."""
    model, fast = pair()
    seen: dict[Any, list[torch.Tensor]] = {model: [], fast: []}
    for m in (model, fast):
        for path in ("self_attn.q_proj", "mlp.gate_proj"):
            projection = m.get_base_model().model.layers[0].get_submodule(path)
            projection.register_forward_hook(lambda module, inputs, output, m=m: seen[m].append(output))
    batch = rows_batch(model.config.vocab_size, (6,))
    for m in (model, fast):
        run(m, batch, logits=False)
    for expected, actual in zip(seen[model], seen[fast], strict=False):
        assert actual.shape == expected.shape and relative_error(actual, expected) < EXACT


def test_a_norm_that_peft_wraps() -> None:
    model = peft.get_peft_model(tiny_model("llama").double(), peft.LNTuningConfig(task_type="CAUSAL_LM"))
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    assert_same(run(bound_copy(model), batch), run(model, batch), EXACT)


def test_an_adapter_that_is_no_pair_of_matrices() -> None:
    config = peft.AdaLoraConfig(target_modules=["q_proj", "down_proj"], total_step=10, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama").double(), config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.normal_()
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    assert_same(run(bound_copy(model, "none"), batch), run(model, batch), EXACT)


def test_an_adapter_for_each_row() -> None:
    model, _ = pair()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    fast = bound_copy(model.eval())
    names = ["default", "second", "__base__"]
    inputs = {"input_ids": torch.arange(12).view(3, 4), "use_cache": False, "adapter_names": names}
    with torch.no_grad():
        assert relative_error(fast(**inputs).logits, model(**inputs).logits) < EXACT


def test_an_activated_lora() -> None:
    batch = rows_batch(320, (9, 9))
    batch.pop("attention_mask")
    batch["input_ids"][:, 4:6] = torch.tensor([7, 8])
    model, fast = pair(alora_invocation_tokens=[7, 8], target_modules=["q_proj", "v_proj"])
    assert_same(run(fast, batch, logits=False), run(model, batch, logits=False), EXACT)


def test_layers_replicated_after_binding() -> None:
    base = tiny_model("llama").double()
    bind(base)
    fast = add_adapter(base, layer_replication=[[0, 2], [1, 2]])
    model = add_adapter(tiny_model("llama").double(), layer_replication=[[0, 2], [1, 2]])
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    assert_same(run(fast, batch), run(model, batch), EXACT)


def test_a_loss_of_ones_own() -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        return logits.float().square().mean()

    model, fast = pair()
    for m in (model, fast):
        m.get_base_model().loss_function = loss
    batch = rows_batch(model.config.vocab_size, (6,))
    assert_same(run(fast, batch), run(model, batch), EXACT)


def test_labels_that_are_shifted_already() -> None:
    model, fast = pair()
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].clone()
    shifted[:, :3] = -100
    batch["shift_labels"] = shifted
    assert_same(run(fast, batch, logits=False), run(model, batch, logits=False), EXACT)


def test_a_second_derivative_is_an_error_and_not_a_wrong_number() -> None:
    _, fast = pair()
    batch = rows_batch(fast.config.vocab_size, (5,))
    embeddings = fast.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    loss = fast.train()(inputs_embeds=embeddings, labels=batch["labels"], use_cache=False).loss
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), embeddings)
