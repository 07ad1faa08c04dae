"""Dynamic quantisation from the arguments to a stock checkpoint, and adapters that make up for what is lost."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pronghorn import DynamicQuantisation
from pronghorn.engine import binding_of
from pronghorn.engine.planning import shape_of
from pronghorn.errors import (
    AdapterMismatch,
    CalibrationMissing,
    CommandMisused,
    PronghornError,
    QuantisationRefused,
    RowsUnreadable,
    UnknownArgument,
)
from pronghorn.export import save_quantised
from pronghorn.loading import FastLanguageModel
from pronghorn.loading.compensation import loftq_settings
from pronghorn.weights import keep_four_bit_layout, read_weight
from pronghorn.weights.experts import four_bit_states
from tests.tiny import save_tiny

ROWS = [
    f"line {i}: the pronghorn ran {i * i} miles and ate sagebrush {'again ' * (i % 5)}" for i in range(60)
]
IDS = torch.tensor([[1, 17, 90, 33, 250, 7, 300, 12, 45, 46, 47, 200]])
PLAIN = {"dtype": "float32", "use_gradient_checkpointing": False, "max_seq_length": 128}
KWARGS = {"load_in_4bit": True, **PLAIN}
SETTINGS = DynamicQuantisation(extra="70%", calibration=ROWS, tokens=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny", "llama")


def load(path, **arguments):
    return FastLanguageModel.from_pretrained(path, **{**KWARGS, **arguments})


@pytest.fixture
def dynamic(folder):
    return load(folder, dynamic_4bit=SETTINGS)


@pytest.fixture(scope="module")
def quantised(folder, tmp_path_factory):
    from pronghorn import hardware
    from pronghorn.loading import fast

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "probe", hardware._cpu_hardware)
        model, tokenizer = load(folder, dynamic_4bit=SETTINGS)
    place = tmp_path_factory.mktemp("out") / "quantised"
    note = {"original": str(folder), **model.pronghorn_quantisation.as_dict()}
    save_quantised(model, tokenizer, place, note)
    return place


def logits(model):
    keep_four_bit_layout(model)
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def divergence(original, other):
    p, q = original.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def stock(path, **arguments):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map={"": "cpu"}, **arguments
    ).eval()


def test_worst_modules_stay_in_16_bits_and_predictions_are_nearer(folder, dynamic):
    model, _ = dynamic
    report = model.pronghorn_quantisation
    names = {m.name: m for m in report.modules}
    dense = {name for name, m in names.items() if m.form.dense}
    assert len(names) == 14 and dense
    for name, module in names.items():
        weight = read_weight(model.get_submodule(name))
        assert weight.label == ("exact" if name in dense else "quantised")
        assert (module.after.output == 0) == (name in dense) and module.after.output < module.before.output
    assert report.nbytes <= report.plain_nbytes * 1.7
    assert {*model.config.quantization_config.llm_int8_skip_modules} == {*dense, "lm_head"}
    assert report.predictions.fitted.kl < 0.5 * report.predictions.plain.kl
    exact = logits(stock(folder))
    plain, _ = load(folder)
    assert divergence(exact, logits(model)) < 0.75 * divergence(exact, logits(plain))
    assert binding_of(model).bound


def test_without_extra_bytes_nothing_grows_and_predictions_are_nearer(folder):
    model, _ = load(folder, dynamic_4bit=DynamicQuantisation(extra=0, calibration=ROWS, tokens=600))
    report = model.pronghorn_quantisation
    assert report.nbytes <= report.plain_nbytes
    assert report.predictions.fitted.kl < 0.75 * report.predictions.plain.kl


def test_stock_transformers_loads_what_is_written(quantised):
    ours, _ = load(quantised)
    again = stock(quantised)
    assert torch.equal(logits(again), logits(stock(quantised)))
    assert torch.allclose(logits(ours), logits(again), atol=2e-5)
    note = json.loads((quantised / "quantisation.json").read_text())
    kept = {m["name"] for m in note["modules"] if m["stored_as"] == "32 bit"}  # this model computes in fp32
    for name, module in again.named_modules():
        if "_proj" in name:
            assert (type(module) is nn.Linear) == (name in kept), name
    state = load_file(quantised / "model.safetensors")
    held = sum(t.nbytes for n, t in state.items() if "_proj" in n and "quant_state" not in n)
    assert held == note["bytes"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_not_quantised_is_in_the_dtype_asked_for(quantised, dtype):
    model, _ = load(quantised, dtype=dtype)
    plain = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert plain == {getattr(torch, dtype)} and model.config.dtype == getattr(torch, dtype)
    assert any(type(module) is nn.Linear for module in model.model.layers.modules())
    assert logits(model).isfinite().all()


def test_lists_of_skipped_modules_as_unsloth_s_checkpoints_have_them(folder, tmp_path):
    """Short names, prefixes and full names; what is in 16 bits reaches the fast path as plain weights."""
    skipped = ["lm_head", "model.layers.1.mlp", "model.layers.0.self_attn.k_proj", "multi_modal_projector"]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=skipped,
    )
    stock(folder, quantization_config=config).save_pretrained(tmp_path / "tiny-unsloth-bnb-4bit")
    shutil.copy(folder / "tokenizer.json", tmp_path / "tiny-unsloth-bnb-4bit")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "tiny-unsloth-bnb-4bit")
    model, _ = load(tmp_path / "tiny-unsloth-bnb-4bit")
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            plain = name.startswith("model.layers.1.mlp") or name == "model.layers.0.self_attn.k_proj"
            assert (read_weight(module).label == "exact") == plain, name
    assert binding_of(model).bound
    expected = logits(stock(tmp_path / "tiny-unsloth-bnb-4bit"))
    assert torch.allclose(logits(model), expected, atol=2e-5)


def adapted_pair(model, path):
    """Ours with an adapter, and stock Transformers and PEFT in fp64 with the same values in all weights."""
    ours = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    truth = stock(path).double()
    base = ours.get_base_model()
    truth = get_peft_model(
        truth, LoraConfig(r=4, lora_alpha=16, target_modules=list(ours.peft_config["default"].target_modules))
    )
    held = dict(base.named_modules())
    with torch.no_grad():
        for name, module in truth.get_base_model().named_modules():
            if type(module) is nn.Linear and "lora_" not in name and "lm_head" not in name:
                module.weight.copy_(read_weight(held[name]).dense(torch.float32))
        given = dict(ours.named_parameters())
        for name, parameter in truth.named_parameters():
            if "lora_" in name:
                parameter.copy_(given[name])
    return ours, truth


def test_mixed_precision_inside_a_group_has_the_gradients_of_its_values(folder, dynamic):
    model, _ = dynamic
    forms = {m.name: m.form for m in model.pronghorn_quantisation.modules}
    groups = [
        {forms[f"model.layers.{i}.{part}.{name}_proj"].dense for name in names}
        for i in range(2)
        for part, names in (("self_attn", "qkv"), ("mlp", ("gate", "up")))
    ]
    assert {True, False} in groups, "no group is mixed: choose another budget"
    ours, truth = adapted_pair(model, folder)
    found = []
    for each in (ours, truth):
        each.train()
        loss = each(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        found.append((loss, {n: p.grad for n, p in each.named_parameters() if p.grad is not None}))
    (loss, gradients), (true_loss, true_gradients) = found
    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-5)
    assert gradients.keys() == true_gradients.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        true = true_gradients[name]
        assert (gradient - true).norm() < 1e-4 * true.norm() + 1e-7, name


def test_the_memory_plan_counts_the_bytes_of_mixed_weights(dynamic, folder):
    model, _ = dynamic
    tensors = shape_of(binding_of(model)).linear_tensors
    held = 0
    for module in model.modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            state = module.weight.quant_state
            held += module.weight.nbytes + state.absmax.nbytes + state.code.nbytes
            held += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes
        elif type(module) is nn.Linear and module is not model.lm_head:
            held += module.weight.nbytes
    assert sum(tensors) == held
    assert not shape_of(binding_of(load(folder)[0])).linear_tensors


# --- adapters that begin with what quantisation lost -------------------------------------------------------------


def test_peft_s_own_loftq_config_is_read():
    assert loftq_settings(LoftQConfig()) == {"loftq_bits": 4, "loftq_iter": 1} and loftq_settings(None) == {}


@pytest.mark.parametrize("weighted", [False, True])
def test_loftq_makes_predictions_nearer_and_says_how_much(folder, quantised, weighted):
    exact = logits(stock(folder))
    model, _ = load(folder)
    before = divergence(exact, logits(model))
    config = {"calibration": ROWS, "tokens": 600} if weighted else None
    adapted = FastLanguageModel.get_peft_model(model, r=16, init_lora_weights="loftq", loftq_config=config)
    report = adapted.pronghorn_compensation
    assert len(report.modules) == 14 and report.weighted == weighted
    for module in report.modules:
        kind = "output" if weighted else "weight"
        assert getattr(module.after, kind) < getattr(module.before, kind), module
    assert divergence(exact, logits(adapted)) < 0.6 * before
    assert binding_of(adapted).bound


def test_loftq_is_the_truncated_svd_and_leaves_16_bit_modules_alone(folder, quantised):
    model, _ = load(quantised)  # quantisation.json names the original
    adapted = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=4, init_lora_weights="loftq")
    original = load_file(folder / "model.safetensors")
    compensated = {m.name for m in adapted.pronghorn_compensation.modules}
    for name, module in adapted.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
        weight = read_weight(module.base_layer)
        assert (name in compensated) == (weight.label == "quantised")
        if name not in compensated:
            assert not b.any() and a.any()
            continue
        residual = original[f"{name}.weight"].double() - weight.dense(torch.float32).double()
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        best = u[:, :8] * s[:8] @ v[:8]
        assert (0.5 * b @ a - best).norm() < 1e-3 * best.norm(), name


def test_weighted_low_rank_has_the_least_output_error():
    from pronghorn.quantising.compensation import low_rank
    from pronghorn.quantising.measure import row_errors

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    x[:, 3] *= 8
    moment, residual = x.t() @ x / 400, torch.randn(40, 24, generator=generator)

    def error(pair):
        return float(row_errors(residual - pair[0] @ pair[1], moment).sum())

    weighted, plain = low_rank(residual, 6, moment), low_rank(residual, 6)
    assert error(weighted) < 0.7 * error(plain)
    for _ in range(20):  # no pair near it is better but for the damping
        moved = tuple(part + 0.01 * torch.randn(part.shape, generator=generator) for part in weighted)
        assert error(moved) > 0.98 * error(weighted)
    b, a = low_rank(torch.randn(3, 5, generator=generator), 7)  # a rank beyond what there is
    assert b.shape == (3, 7) and a.shape == (7, 5) and torch.isfinite(b @ a).all()


def test_a_compensating_adapter_reloads_on_its_base_only(folder, quantised, tmp_path):
    model, tokenizer = load(quantised)
    adapted = FastLanguageModel.get_peft_model(model, r=8, init_lora_weights="loftq")
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    # Saved once more, it is still known.
    again.save_pretrained(tmp_path / "again")
    assert (
        "quantised_base" in json.loads((tmp_path / "again/adapter_config.json").read_text())["loftq_config"]
    )
    # Stock PEFT takes it, too.
    stock_again = PeftModel.from_pretrained(stock(quantised), tmp_path / "again")
    assert torch.allclose(logits(stock_again), expected, atol=2e-5)
    # Merged into what the base's codes stand for, it is near the original; nothing is counted twice.
    merged = adapted.save_pretrained_merged(tmp_path / "merged", tokenizer)
    exact = logits(stock(folder))
    merged_logits = logits(stock(merged.folder))
    assert torch.allclose(merged_logits, expected, atol=1e-4)
    assert divergence(exact, merged_logits) < divergence(exact, logits(stock(quantised)))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for other, word in ((folder, "not quantised"), (folder, "quantised otherwise")):
        (tmp_path / "adapter/adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": str(other)})
        )
        with pytest.raises(AdapterMismatch, match=word):
            load(tmp_path / "adapter", load_in_4bit=word == "quantised otherwise")


# --- what is refused ---------------------------------------------------------------------------------------------


def test_refusals_name_what_helps(folder, quantised, tmp_path):
    with pytest.raises(UnknownArgument, match="loaded in 4 bits"):
        load(folder, load_in_4bit=False, dynamic_4bit=True)
    with pytest.raises(UnknownArgument, match="dynamic_4bit='yes'"):
        load(folder, dynamic_4bit="yes")
    with pytest.raises(UnknownArgument, match="nf4, not fp4"):
        load(folder, dynamic_4bit=True, bnb_4bit_quant_type="fp4")
    for extra in ("lots", "-5%", True, 1.5):
        with pytest.raises(UnknownArgument, match="no amount of bytes"):
            DynamicQuantisation(extra=extra)
    with pytest.raises(UnknownArgument, match="too few"):
        DynamicQuantisation(tokens=3)
    with pytest.raises(CalibrationMissing, match="no rows"):
        load(folder, dynamic_4bit=DynamicQuantisation(calibration=[]))
    with pytest.raises(CalibrationMissing, match="holds no rows"):
        load(folder, dynamic_4bit=DynamicQuantisation(calibration=7))
    with pytest.raises(CommandMisused):
        load(folder, dynamic_4bit=DynamicQuantisation(calibration=str(tmp_path / "absent.jsonl")))
    with pytest.raises(QuantisationRefused, match="quantised already"):
        load(quantised, dynamic_4bit=SETTINGS)
    mixture = save_tiny(tmp_path / "mixture", "gpt_oss", num_local_experts=4)
    with pytest.raises(QuantisationRefused, match="inputs in rows"):
        load(mixture, dynamic_4bit=SETTINGS)


def test_a_mixture_trains_and_answers_on_fitted_stacks(tmp_path):
    path = save_tiny(tmp_path / "mixture", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    # Less than all in 16 bits takes, enough for a stack or two.
    model, _ = load(path, dynamic_4bit=DynamicQuantisation(extra="200%", calibration=ROWS, tokens=600))
    report = model.pronghorn_quantisation
    stacks = {m.name: m for m in report.modules if "experts" in m.name}
    assert len(stacks) == 4 and {m.shape for m in stacks.values()} == {(4 * 256, 64), (4 * 64, 128)}
    dense = {name for name, m in stacks.items() if m.form.dense}
    assert report.nbytes <= 3 * report.plain_nbytes and 0 < len(dense) < 4
    for index, layer in enumerate(model.model.layers):
        held = {f"model.layers.{index}.mlp.experts.{name}" for name in four_bit_states(layer.mlp.experts)}
        assert held | dense >= {name for name in stacks if f"layers.{index}." in name} and not held & dense
    assert report.predictions.fitted.kl < 0.5 * report.predictions.plain.kl
    assert binding_of(model).bound
    shape, held = shape_of(binding_of(model)), 0
    for layer in model.model.layers:
        experts = layer.mlp.experts
        held += sum(p.nbytes for p in experts.parameters())
        for name, state in four_bit_states(experts).items():
            held += experts._buffers[f"{name}_packed"].nbytes + state.absmax.nbytes + state.code.nbytes
            held += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes
    assert sum(shape.stack_tensors) == held and shape.storage_of_stacks == "nf4"
    others = sum(p.nbytes for name, p in model.named_parameters() if "experts" not in name)
    assert sum(shape.weight_tensors()) == pytest.approx(held + others, rel=0.01)
    assert not shape_of(binding_of(load(path)[0])).stack_tensors
    exact, plain = logits(stock(path)), logits(load(path)[0])
    assert divergence(exact, logits(model)) < 0.5 * divergence(exact, plain)
    adapted = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]
    )
    loss = adapted(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    grads = [
        p.grad for n, p in adapted.named_parameters() if (p.requires_grad and "lora_A" in n) or "lora_B" in n
    ]
    assert loss.isfinite() and all(g is not None and g.isfinite().all() for g in grads)


def test_an_unreadable_calibration_row_is_named(folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "the pronghorn ran"}\n{"text": broken\n{"text": "again"}\n')
    with pytest.raises(RowsUnreadable, match="cannot be read") as caught:
        load(folder, dynamic_4bit=DynamicQuantisation(calibration=str(file)))
    assert "line 2" in str(caught.value)
    file.write_text('{"text": "the pronghorn ran"}\n{"number": 7}\n')
    with pytest.raises(PronghornError) as caught:
        load(folder, dynamic_4bit=DynamicQuantisation(calibration=str(file)))
    assert "line 2" in str(caught.value)


def test_refusals_of_adapters_name_what_helps(folder, quantised, tmp_path):
    def adapt(path, **arguments):
        return FastLanguageModel.get_peft_model(load(path)[0], r=4, **arguments)

    with pytest.raises(QuantisationRefused, match="pissa"):
        adapt(folder, init_lora_weights="pissa")
    with pytest.raises(UnknownArgument, match="no 'originel'"):
        adapt(folder, init_lora_weights="loftq", loftq_config={"originel": "x"})
    with pytest.raises(UnknownArgument, match="loftq_iter"):
        adapt(folder, init_lora_weights="loftq", loftq_config={"loftq_iter": 5})
    with pytest.raises(QuantisationRefused, match="no 16-bit checkpoint"):
        adapt(folder, init_lora_weights="loftq", loftq_config={"original": str(tmp_path)})
    with pytest.raises(QuantisationRefused, match="quantised itself"):
        adapt(folder, init_lora_weights="loftq", loftq_config={"original": str(quantised)})
