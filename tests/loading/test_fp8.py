"""Models loaded for fp8 products: what is quantised, what it predicts, and where it goes from there."""

import logging

import pytest
import torch
from peft import PeftModel
from torch import nn

from pronghorn.engine import binding_of
from pronghorn.errors import Fp8Unavailable, UnknownArgument
from pronghorn.hardware import Fact, Hardware, probe
from pronghorn.loading import FastLanguageModel, fast
from pronghorn.loading.fp8 import choose_fp8
from pronghorn.weights import Fp8FourBitWeight, Fp8GradWeight, Fp8Linear, Fp8Weight, read_weight, stacked
from tests.loading.stored import IDS, adapted, logits, stock
from tests.tiny import save_tiny

LAYERS = 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama", num_hidden_layers=LAYERS)


def load(path, **arguments):
    given = {
        "dtype": "float32",
        "max_seq_length": 128,
        "load_in_fp8": True,
        "fp8_skip_layers": 1,
        **arguments,
    }
    return FastLanguageModel.from_pretrained(str(path), **given)


def kinds(model) -> set[type]:
    return {type(read_weight(m)) for m in model.modules() if isinstance(m, nn.Linear)}


def test_middle_layers_are_quantised_and_say_so(llama):
    model, _ = load(llama)
    found = [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]
    assert len(found) == 2 * 7 and all(
        name.startswith(("model.layers.1.", "model.layers.2.")) for name in found
    )
    assert binding_of(model).bound and "fp8" in binding_of(model).describe()
    assert not any(
        p.requires_grad for m in model.modules() if isinstance(m, Fp8Linear) for p in m.parameters()
    )
    reference = logits(stock(llama))
    divergence = nn.functional.kl_div(
        logits(model).log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert 0 < divergence.mean() < 0.02


def test_modules_and_copies_are_chosen(llama):
    model, _ = load(llama, fp8_modules=["down_proj"], fp8_copies=2)
    found = {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert [name.rpartition(".")[2] for name in found] == ["down_proj"] * 2
    assert all(module.weight_transposed is not None for module in found.values())


@pytest.mark.parametrize("copies", [1, 2])
def test_projections_of_one_input_lie_side_by_side(llama, copies):
    model, _ = load(llama, fp8_copies=copies)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    qkv = stacked([read_weight(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj)])
    assert qkv is not None and qkv.shape == (128, 64) and (qkv.transposed is not None) == (copies == 2)
    assert stacked([read_weight(mlp.gate_proj), read_weight(mlp.up_proj)]) is not None
    assert stacked([read_weight(attention.v_proj), read_weight(attention.o_proj)]) is None


def test_streamed_by_way_of_the_cpu(llama, monkeypatch):
    """What a GPU's device map does, with the CPU in the GPU's place."""
    seen = []
    of = Fp8Linear.of
    monkeypatch.setattr(
        Fp8Linear, "of", staticmethod(lambda m, **given: seen.append(given["device"]) or of(m, **given))
    )
    streamed, _ = load(llama, device_map={"": "cpu"})
    assert seen == [torch.device("cpu")] * 14
    assert torch.equal(logits(streamed), logits(load(llama)[0]))


def test_blocks_and_stock_modules_hold_the_same_values(llama):
    """The stock forward multiplies dequantised weights; the blocks also round activations, by 1/16 at most."""
    model, _ = load(llama)
    fast_logits = logits(model)
    binding_of(model).undo()
    stock_logits = logits(model)
    assert not torch.equal(fast_logits, stock_logits)
    assert (fast_logits - stock_logits).norm() / stock_logits.norm() < 0.06


def test_adapter_gradients_stay_close_to_the_unquantised_models(llama):
    def gradients(model):
        model.train()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    reference = gradients(adapted(FastLanguageModel.from_pretrained(str(llama), dtype="float32")[0]))
    mixed = {"load_in_fp8": "mixed", "fp8_modules": ["up_proj"]}
    for arguments in ({}, {"load_in_fp8": "backward"}, {"fp8_copies": 2}, mixed):
        found = gradients(adapted(load(llama, **arguments)[0]))
        assert found.keys() == reference.keys() and len(found) == LAYERS * 7 * 2
        for name, gradient in found.items():
            assert torch.cosine_similarity(gradient.flatten(), reference[name].flatten(), 0) > 0.97, name


def test_backward_only_is_exact_forward(llama):
    model, _ = load(llama, load_in_fp8="backward")
    plain, _ = FastLanguageModel.from_pretrained(str(llama), dtype="float32", max_seq_length=128)
    assert Fp8GradWeight in kinds(model) and not any(isinstance(m, Fp8Linear) for m in model.modules())
    assert torch.equal(logits(model), logits(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_mixed_quantises_the_chosen_and_only_the_gradient_of_others(llama):
    model, _ = load(llama, load_in_fp8="mixed", fp8_modules=["up_proj", "gate_proj"])
    full = {n for n, m in model.named_modules() if isinstance(m, Fp8Linear)}
    half = {
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and isinstance(read_weight(m), Fp8GradWeight)
    }
    assert full == {f"model.layers.{i}.mlp.{kind}_proj" for i in (1, 2) for kind in ("up", "gate")}
    assert len(half) == LAYERS * 7 - len(full) and "lm_head" not in half


def test_each_kind_has_its_own_defaults(llama):
    def chosen(kind):
        model, _ = load(llama, load_in_fp8=kind, fp8_skip_layers=None)
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        return [sum(isinstance(read_weight(m), k) for m in linears) for k in (Fp8Weight, Fp8GradWeight)]

    assert chosen("mixed") == [2 * 3, LAYERS * 7 - 2 * 3]  # a quarter of four layers at either end is one
    assert chosen("backward") == [0, LAYERS * 7]
    with pytest.raises(UnknownArgument, match="fp8_skip_layers=2"):
        chosen(True)


def test_codes_follow_a_merged_adapter(llama):
    model = adapted(load(llama, load_in_fp8="backward", fp8_copies=2)[0]).merge_and_unload()
    name = "model.layers.1.self_attn.q_proj"
    before = read_weight(model.get_submodule(name)).transposed.float()
    wrapped = FastLanguageModel.get_peft_model(model, r=4)
    after = read_weight(wrapped.get_base_model().get_submodule(name).base_layer)
    assert not torch.equal(after.transposed.float(), before)

    values = (after.transposed.float() * after.scales.view(1, -1)).t()
    assert torch.allclose(values, after.weight, rtol=1 / 15, atol=1e-4)


def test_four_bits_stored_and_fp8_multiplied(llama):
    pytest.importorskip("bitsandbytes")
    model, _ = load(llama, load_in_4bit=True)
    assert Fp8FourBitWeight in kinds(model)
    plain, _ = load(llama, load_in_4bit=True, load_in_fp8=False)
    exact = logits(plain)
    assert 0 < (logits(model) - exact).norm() / exact.norm() < 0.08


def test_adapter_and_merged_model_come_back(llama, tmp_path, caplog):
    model = adapted(load(llama)[0])
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    assert torch.equal(logits(again), expected)

    with caplog.at_level(logging.WARNING):
        model.save_pretrained_merged(str(tmp_path / "merged"))
    assert "fp8 values" in caplog.text
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
    assert not any(isinstance(module, Fp8Linear) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_saving_the_base_writes_what_stock_transformers_loads(llama, tmp_path):
    model, tokenizer = load(llama)
    model.save_pretrained(str(tmp_path / "base"))
    tokenizer.save_pretrained(tmp_path / "base")
    again = stock(tmp_path / "base")
    weight = model.model.layers[1].mlp.up_proj.dense()
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight, weight)
    # Stored values are bf16 numbers with power-of-two scales: quantised once more, they are the same.
    assert torch.equal(load(tmp_path / "base")[0].model.layers[1].mlp.up_proj.dense(), weight)


@pytest.mark.parametrize(
    "arguments",
    [
        {"load_in_fp8": "block"},
        {"load_in_8bit": True},
        {"load_in_4bit": True, "load_in_fp8": "backward"},
        {"full_finetuning": True},
        {"fp8_copies": 3},
        {"fp8_copies": True},
        {"fp8_skip_layers": True},
        {"fp8_modules": "down_proj"},
        {"fp8_modules": 3},
        {"fp8_skip_layers": -1},
        {"fp8_skip_layers": 2},
        {"fp8_modules": ["nothing"]},
    ],
)
def test_what_makes_no_sense_is_refused(llama, arguments):
    with pytest.raises(UnknownArgument):
        load(llama, **arguments)


def gpu(capability) -> Hardware:
    from pronghorn.hardware import _fp8_fact

    fact = _fp8_fact(f"compute capability {capability[0]}.{capability[1]}", capability)
    return Hardware("cuda", "a GPU", capability, 0, Fact("bfloat16", "-"), Fact(True, "-"), 1, fact)


def test_hardware_decides_how_and_whether(llama, monkeypatch):
    fixed = {"bits": 16, "full_finetuning": False, "skip_layers": 2, "modules": None, "copies": 1}
    assert choose_fp8(True, gpu((9, 0)), **fixed).rowwise
    assert not choose_fp8(True, gpu((8, 9)), **fixed).rowwise
    assert not choose_fp8(True, gpu((12, 0)), **fixed).rowwise
    assert choose_fp8(False, gpu((7, 5)), **fixed) is None
    with pytest.raises(Fp8Unavailable, match=r"8\.0"):
        choose_fp8(True, gpu((8, 0)), **fixed)
    assert probe().fp8.reason
    monkeypatch.setattr(fast, "probe", lambda: gpu((7, 5)))
    with pytest.raises(Fp8Unavailable):
        load(llama)


def test_one_scale_a_tensor(llama, monkeypatch):
    from pronghorn import hardware

    ada = hardware._cpu_hardware()
    object.__setattr__(ada, "fp8", Fact("tensors", "as on Ada"))
    monkeypatch.setattr(fast, "probe", lambda: ada)
    model, _ = load(llama)
    assert model.model.layers[1].mlp.up_proj.weight_scale.shape == (1, 1)
    exact = logits(stock(llama))
    assert (logits(model) - exact).norm() / exact.norm() < 0.1
