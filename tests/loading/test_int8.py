"""Models loaded for int8 products: what is quantised, what it predicts and learns, and where it goes from there."""

import logging

import pytest
import torch
from peft import PeftModel
from torch import nn

from pronghorn.engine import binding_of
from pronghorn.engine.planning import keep_expanded_weights
from pronghorn.errors import AdapterProblem, Int8Unavailable, UnknownArgument
from pronghorn.hardware import Fact, Hardware, _int8_fact, probe
from pronghorn.kernels.int8 import dequantise
from pronghorn.loading import FastLanguageModel, fast
from pronghorn.weights import Int8FourBitWeight, Int8Linear, read_weight, stacked
from tests.loading.stored import IDS, adapted, gradients, logits, stock
from tests.tiny import save_tiny

LAYERS = 3
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    # Heads of 32: q, k and v are multiples of 64 wide, so that their input gradient is one product.
    folder = tmp_path_factory.mktemp("models") / "llama"
    return save_tiny(folder, "llama", num_hidden_layers=LAYERS, head_dim=32)


def load(path, **arguments):
    given = {"dtype": "float32", "max_seq_length": 128, "load_in_int8": True, **arguments}
    return FastLanguageModel.from_pretrained(str(path), **given)


def integers(model) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def test_all_layers_are_quantised_and_say_so(llama):
    model, _ = load(llama)
    found = integers(model)
    assert len(found) == LAYERS * 7 and all(name.startswith("model.layers.") for name in found)
    described = binding_of(model).describe()
    assert binding_of(model).bound and "int8 two" in described and "quantised" in described
    assert not any(p.requires_grad for module in found.values() for p in module.parameters())
    reference = logits(stock(llama))
    divergence = nn.functional.kl_div(
        logits(model).log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert 0 < divergence.mean() < 0.002


def test_layers_modules_and_copies_are_chosen(llama):
    model, _ = load(llama, int8_skip_layers=1, int8_modules=["down_proj", "q_proj"], int8_copies=1)
    found = integers(model)
    assert [*found] == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    assert all(module.weight_back is None for module in found.values())
    assert "int8" in binding_of(model).describe()
    gradients(adapted(model))  # q alone in int8 among its group


@pytest.mark.parametrize("copies", [1, 2])
def test_projections_of_one_input_lie_side_by_side(llama, copies):
    model, _ = load(llama, int8_copies=copies)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    qkv = stacked([read_weight(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj)])
    assert qkv is not None and qkv.shape == (256, 64) and (qkv.back is not None) == (copies == 2)
    assert stacked([read_weight(mlp.gate_proj), read_weight(mlp.up_proj)]) is not None


def test_streamed_by_way_of_the_cpu(llama, monkeypatch):
    """What a GPU's device map does, with the CPU in the GPU's place."""
    seen = []
    group = Int8Linear.group
    monkeypatch.setattr(
        Int8Linear,
        "group",
        staticmethod(lambda m, **given: seen.append(given["device"]) or group(m, **given)),
    )
    streamed, _ = load(llama, device_map={"": "cpu"})
    assert seen == [torch.device("cpu")] * LAYERS * 4
    assert torch.equal(logits(streamed), logits(load(llama)[0]))


def test_blocks_and_stock_modules_hold_the_same_values(llama):
    """The stock forward multiplies dequantised weights; the blocks also round activations."""
    model, _ = load(llama)
    fast_logits = logits(model)
    binding_of(model).undo()
    stock_logits = logits(model)
    assert not torch.equal(fast_logits, stock_logits)
    assert (fast_logits - stock_logits).norm() / stock_logits.norm() < 0.02


@pytest.mark.parametrize("copies", [1, 2])
def test_adapter_gradients_are_those_of_the_dequantised_weights(llama, copies):
    """Autograd through the stored values, within the rounding of activations and gradients; and the truth near it."""
    model = adapted(load(llama, int8_copies=copies)[0])
    found = gradients(model)
    binding_of(model.get_base_model()).undo()
    stored = gradients(model)
    exact = gradients(adapted(FastLanguageModel.from_pretrained(str(llama), dtype="float32")[0]))
    assert found.keys() == stored.keys() == exact.keys() and len(found) == LAYERS * 7 * 2
    for name, gradient in found.items():
        assert not torch.equal(gradient, stored[name])
        assert (gradient - stored[name]).norm() / stored[name].norm() < 0.08, name
        assert torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), 0) > 0.99, name


@pytest.mark.parametrize("copies", [1, 2])
def test_every_save_level_gives_the_same_loss_and_nearly_the_same_gradients(llama, copies):
    model = adapted(load(llama, int8_copies=copies)[0])
    binding, results = binding_of(model.get_base_model()), []
    for level in ("none", "attention", "matmuls", "all"):
        binding.set_save_levels(level)
        results.append((logits(model), gradients(model)))
    for outputs, found in results[1:]:
        assert torch.equal(outputs, results[0][0])
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-4, atol=1e-6)


def test_adapter_and_merged_model_come_back(llama, tmp_path, caplog):
    model = adapted(load(llama)[0])
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    assert torch.equal(logits(again), expected)

    with caplog.at_level(logging.WARNING):
        model.save_pretrained_merged(str(tmp_path / "merged"))
    assert "int8 values" in caplog.text and "load_in_int8" in caplog.text
    merged = stock(tmp_path / "merged")
    inner = model.get_base_model()
    binding_of(inner).undo()
    torch.testing.assert_close(logits(merged), logits(inner), atol=1e-5, rtol=1e-5)


def test_peft_merges_into_dequantised_layers(llama):
    model = adapted(load(llama)[0])
    assert isinstance(model, PeftModel)
    binding_of(model.get_base_model()).undo()
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not integers(merged)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_saving_the_base_writes_what_stock_transformers_loads(llama, tmp_path):
    model, tokenizer = load(llama)
    model.save_pretrained(str(tmp_path / "base"))
    tokenizer.save_pretrained(tmp_path / "base")
    again = stock(tmp_path / "base")
    weight = model.model.layers[1].mlp.up_proj.dense()
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight, weight)


def test_answers_are_the_stock_models(llama):
    model, _ = load(llama)
    FastLanguageModel.for_inference(model)
    answer = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert answer.shape == (1, IDS.shape[1] + 4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"load_in_int8": "mixed"},
        {"load_in_8bit": True},
        {"load_in_fp8": True},
        {"full_finetuning": True},
        {"int8_copies": 3},
        {"int8_copies": True},
        {"int8_skip_layers": True},
        {"int8_modules": "down_proj"},
        {"int8_modules": 3},
        {"int8_skip_layers": -1},
        {"int8_skip_layers": 2},
        {"int8_modules": ["nothing"]},
    ],
)
def test_what_makes_no_sense_is_refused(llama, arguments):
    with pytest.raises(UnknownArgument, match=r"int8|fp8"):
        load(llama, **arguments)


def four_bit(path, **arguments):
    pytest.importorskip("bitsandbytes")
    return load(path, load_in_4bit=True, **{"int8_modules": PROJECTIONS, **arguments})


def test_queries_and_keys_of_four_bits_are_multiplied_in_16_bits(llama):
    model, _ = four_bit(llama, int8_modules=None)
    layer = model.model.layers[0]
    storage = {
        name.rpartition(".")[2]: read_weight(module).storage
        for name, module in layer.named_modules()
        if name.endswith("_proj")
    }
    assert [name for name in storage if storage[name] == "nf4 double"] == ["q_proj", "k_proj"]
    assert all("int8" in storage[name] for name in storage if name not in ("q_proj", "k_proj"))
    gradients(adapted(model))


def test_four_bits_are_multiplied_in_int8(llama):
    """Only scales are added; what the stock modules give and what the blocks multiply is the same 4-bit weight."""
    model, _ = four_bit(llama)
    plain, _ = load(llama, load_in_4bit=True, load_in_int8=False)
    assert [*model.state_dict()] == [*plain.state_dict()] and not integers(model)
    described = binding_of(model).describe()
    assert "in int8 products" in described and "quantised" in described
    layer = model.model.layers[0]
    for names in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]):
        parent = layer.self_attn if "q_proj" in names else layer.mlp
        whole = stacked([read_weight(getattr(parent, name)) for name in names])
        assert isinstance(whole, Int8FourBitWeight) and len(whole.parts) == len(names)
        codes, scales = whole.codes_forward()
        assert dequantise(codes, scales, torch.float32).sub(whole.dense(torch.float32)).abs().max() < 0.01
    reference = logits(plain)
    divergence = nn.functional.kl_div(
        logits(model).log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert 0 < divergence.mean() < 0.002


def test_adapter_gradients_over_four_bits(llama):
    """Expanded for each product, kept, and at every save level: the same, and near to 16-bit products."""
    model, expected = adapted(four_bit(llama)[0]), None
    near = gradients(adapted(load(llama, load_in_4bit=True, load_in_int8=False)[0]))
    binding = binding_of(model)
    for keep in (False, True):
        held = keep_expanded_weights(binding, keep)
        assert held == (keep and 2 * sum(m.weight.numel() * 2 for m in four_bit_modules(model)))
        for level in ("all", "attention", "none"):
            binding.set_save_levels(level)
            found = gradients(model)
            expected = expected or found
            for name, gradient in found.items():
                assert nn.functional.cosine_similarity(gradient.flatten(), near[name].flatten(), 0) > 0.99
                torch.testing.assert_close(
                    gradient, expected[name], rtol=0, atol=1e-3 * gradient.abs().max().item()
                )


def four_bit_modules(model):
    return [m for m in model.modules() if getattr(m._parameters.get("weight"), "quant_state", None)]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["down_proj"]}])
@pytest.mark.parametrize("storage", ["load_in_int8", "load_in_fp8"])
def test_adapters_that_need_the_weights_themselves_are_refused(llama, storage, settings):
    model, _ = load(llama, **{"load_in_int8": False, storage: True}, fp8_skip_layers=0)
    with pytest.raises(AdapterProblem, match="8-bit codes"):
        FastLanguageModel.get_peft_model(model, r=4, **settings)


def test_widths_that_cannot_be_turned_stay(tmp_path, caplog):
    folder = save_tiny(tmp_path / "odd", "llama", intermediate_size=120)
    with caplog.at_level(logging.WARNING):
        model, _ = load(folder)
    assert "6 linear layers stay" in caplog.text and len(integers(model)) == 2 * 4
    gradients(adapted(model))


def gpu(capability) -> Hardware:
    fact = _int8_fact(f"compute capability {capability[0]}.{capability[1]}", capability)
    none = Fact(None, "-")
    return Hardware("cuda", "a GPU", capability, 0, Fact("float16", "-"), Fact(True, "-"), 1, none, fact)


def test_hardware_decides_whether(llama, monkeypatch):
    assert gpu((7, 5)).int8.value == gpu((9, 0)).int8.value == "units" and probe().int8.reason
    monkeypatch.setattr(fast, "probe", lambda: gpu((7, 0)))
    with pytest.raises(Int8Unavailable, match=r"7\.0"):
        load(llama)
