"""Binding: what is refused and why, what it leaves untouched, and what it says."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from pronghorn.engine import bind, binding_of
from pronghorn.errors import BackwardTwice, BindingRefused, UnknownSaveLevel
from tests.families.parity import (
    add_adapter,
    assert_same,
    bound_copy,
    quantise_4bit,
    relative_error,
    rows_batch,
    run,
)
from tests.tiny import tiny_model


def test_other_instances_stay_stock() -> None:
    first, second = tiny_model("llama"), tiny_model("llama")
    forward = type(first).forward
    bind(first)
    assert "forward" not in second.__dict__ and type(first).forward is forward


def test_state_dict_is_untouched() -> None:
    model = tiny_model("qwen3")
    before = list(model.state_dict())
    bind(model)
    assert list(model.state_dict()) == before
    assert "pronghorn_binding" not in dict(model.named_modules())


def test_bound_model_survives_pickle_and_deepcopy() -> None:
    model = tiny_model("llama").double()
    bind(model)
    batch = rows_batch(model.config.vocab_size, (6, 4))
    expected = run(model, batch)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert binding_of(twin).model is twin
        assert_same(run(twin, batch), expected, 0.0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_decoder_without_a_head_is_bound(family: str) -> None:
    stock = tiny_model(family).double().model
    model = copy.deepcopy(stock)
    binding = bind(model)
    assert binding.bound and binding.decoder is model and binding_of(model) is binding
    batch = rows_batch(model.config.vocab_size, (6, 4))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    expected = stock(**inputs, use_cache=False).last_hidden_state[real]
    found = model(**inputs, use_cache=False).last_hidden_state[real]
    # Stock norms round to fp32 whatever the model's dtype.
    assert relative_error(found, expected) < 1e-6
    binding.undo()
    assert binding_of(model) is None and "forward" not in model.__dict__


def test_unknown_family_stays_stock_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    binding = bind(model)
    assert not binding.bound and "gpt2" in binding.describe()
    assert "GPT2Block (LayerNorm, GPT2Attention, GPT2MLP) has LayerNorm with biases" in binding.describe()
    assert "stock forward" in caplog.text
    assert "forward" not in model.__dict__
    with pytest.raises(BindingRefused, match="gpt2"):
        bind(model, strict=True)


def test_other_activation_is_refused_with_its_name() -> None:
    binding = bind(tiny_model("llama", hidden_act="relu"))
    assert not binding.bound and "'relu'" in binding.reasons[0]


def test_changed_layer_class_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = nn.Identity()
    binding = bind(model)
    assert not binding.bound and "LlamaMLP is a Identity" in binding.reasons[0]


def test_a_module_that_no_block_computes_is_named() -> None:
    """A layer of a known class to which somebody added weights."""
    model = tiny_model("llama")
    model.model.layers[1].self_attn.gate = nn.Linear(64, 64)
    reasons = bind(model).reasons
    assert reasons == ["self_attn.gate is a Linear that the blocks do not compute"]
    with pytest.raises(BindingRefused, match=r"self_attn\.gate is a Linear"):
        bind(model, strict=True)


def test_a_config_that_the_family_does_not_cover_is_refused() -> None:
    assert bind(tiny_model("phi3", resid_pdrop=0.1)).reasons == ["resid_pdrop=0.1"]
    assert bind(tiny_model("gemma3_text", use_bidirectional_attention=True)).reasons == [
        "use_bidirectional_attention"
    ]


def test_a_reviewed_stock_family_says_what_is_missing() -> None:
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = Starcoder2ForCausalLM(Starcoder2Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
    binding = bind(model)
    assert "Starcoder2DecoderLayer" in binding.reasons[0] and "without a gate" in binding.reasons[0]
    loss = model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss
    loss.backward()
    assert loss.isfinite()


def test_save_levels_are_checked() -> None:
    binding = bind(tiny_model("llama"))
    with pytest.raises(UnknownSaveLevel, match="did you mean 'matmuls'"):
        binding.set_save_levels("matmul")
    with pytest.raises(UnknownSaveLevel, match="3 save levels were given for 2 layers"):
        binding.set_save_levels(["none"] * 3)
    binding.set_save_levels("unsloth")
    assert set(binding.save_levels) == {"offload"}


def test_second_backward_is_an_error_and_not_a_wrong_number() -> None:
    model = bound_copy(add_adapter(tiny_model("llama")))
    loss = model(**rows_batch(model.config.vocab_size, (6,)), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(BackwardTwice, match="PH203"):
        loss.backward()


def test_describe_names_what_is_not_in_the_blocks() -> None:
    model = bound_copy(add_adapter(tiny_model("llama"), use_dora=True, target_modules=["q_proj"]), "none")
    text = binding_of(model).describe()
    assert "2x none" in text and "cpu" in text
    assert "2 projections (first layers.0.q_proj): the adapter is a Dora variant" in text


def test_hooks_on_a_projection_still_run() -> None:
    model = add_adapter(tiny_model("llama").double())
    fast = bound_copy(model)
    calls = []
    for m in (model, fast):
        m.base_model.model.model.layers[0].mlp.up_proj.register_forward_hook(
            lambda *a: calls.append(1) or a[2] * 1.5
        )
    batch = rows_batch(model.config.vocab_size, (6, 5))
    assert_same(run(fast, batch), run(model, batch), 5e-6)
    assert len(calls) > 2


def test_frozen_lower_layers_cost_no_backward() -> None:
    """Below the lowest adapter nothing is kept and nothing is computed backward."""
    model = add_adapter(tiny_model("llama", num_hidden_layers=3), layers_to_transform=[2])
    fast = bound_copy(model)
    loss = fast(**rows_batch(model.config.vocab_size, (6,)), use_cache=False).loss
    nodes, layers, queue = set(), 0, [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        layers += "DecoderLayer" in node.name()
        queue += [parent for parent, _ in node.next_functions]
    assert layers == 1


def test_transformers_checkpointing_flag_becomes_the_lowest_level() -> None:
    model = add_adapter(tiny_model("llama").double())
    fast = bound_copy(model, "all")
    for m in (model, fast):
        m.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    batch = rows_batch(model.config.vocab_size, (6, 5))
    assert_same(run(fast, batch), run(model, batch), 5e-6)


def test_stock_is_used_and_told_for_hidden_states(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    bind(model)
    model.train()
    output = model(torch.arange(5)[None], output_hidden_states=True)
    assert len(output.hidden_states) == 3 and "output_hidden_states" in caplog.text


def test_collecting_hidden_states_once_leaves_the_fast_path_on() -> None:
    """Transformers leaves its hooks on the modules it collected from."""
    model = tiny_model("llama")
    bind(model)
    model.train()
    model(torch.arange(5)[None], output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    assert "stock decoder" not in binding_of(model).describe()


def test_tuples_instead_of_outputs() -> None:
    stock, model = tiny_model("llama"), tiny_model("llama")
    bind(model)
    ids = torch.arange(5)[None]
    for arguments in ({"labels": ids}, {}, {"labels": ids, "use_cache": False}):
        found = model(ids, return_dict=False, **arguments)
        expected = stock(ids, return_dict=False, **arguments)
        assert type(found) is tuple and len(found) == len(expected)
        torch.testing.assert_close(found[0], expected[0])
    assert type(model.model(ids, use_cache=False, return_dict=False)) is tuple


def test_autocast_computes_in_its_dtype() -> None:
    """fp32 weights under bf16 autocast: products in bf16, gradients and the residual stream in fp32."""
    model = add_adapter(tiny_model("llama"))
    fast = bound_copy(model, "all")
    batch = rows_batch(model.config.vocab_size, (9, 5))
    exact = run(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        stock, ours = run(model, batch), run(fast, batch)
    assert all(g.dtype == torch.float32 for g in ours.gradients.values())
    with pytest.raises(AssertionError):  # it did compute in bf16
        assert_same(ours, exact, 1e-5)
    for name, gradient in exact.gradients.items():
        theirs = relative_error(stock.gradients[name], gradient)
        assert relative_error(ours.gradients[name], gradient) < 2 * theirs + 2**-7, name


def test_four_bit_weights_compute_in_the_dtype_they_were_loaded_for() -> None:
    """fp32 embeddings and norms over NF4 weights, as PEFT's k-bit preparation leaves them, multiply in bf16."""
    pytest.importorskip("bitsandbytes")
    model = add_adapter(quantise_4bit(tiny_model("llama"), double_quant=False))
    batch = rows_batch(model.config.vocab_size, (9, 5))
    binding = bind(model, strict=True)
    assert binding.weight_dtype is None  # bitsandbytes' default asks for nothing
    exact = run(model, batch, logits=False)
    linears = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    for linear in linears:
        linear.compute_dtype = torch.bfloat16
    assert binding.weight_dtype == torch.bfloat16
    low = run(model, batch, logits=False)
    errors = [relative_error(low.gradients[name], gradient) for name, gradient in exact.gradients.items()]
    assert 1e-4 < max(errors) < 5e-2
    assert all(gradient.dtype == torch.float32 for gradient in low.gradients.values())
