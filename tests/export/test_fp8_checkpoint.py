"""The fp8 form: stock Transformers loads it, and so do we; codes are right to half a step, what has no such form is
refused."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from pronghorn import FastLanguageModel
from pronghorn.errors import NotExportable
from pronghorn.export import save_merged
from pronghorn.export.fp8 import block_scales, quantise_blocks
from pronghorn.export.merge import plan_merge
from tests.export.test_merged import logits, trained
from tests.families.mixtures import tiny_mixture
from tests.tiny import tiny_model, tiny_tokenizer


def stored(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def value(codes, scales):
    """What codes and scales mean, written out: element (i, j) has the scale of its block."""
    rows, columns = (size // count for size, count in zip(codes.shape, scales.shape, strict=True))
    return codes.float() * scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_families_load_in_stock_transformers(tmp_path, family):
    model = trained(tiny_model(family, dtype=torch.bfloat16, tie_word_embeddings=family.startswith("gemma")))
    done = save_merged(model, tiny_tokenizer(), tmp_path / "out", "fp8")
    assert done.checks[0].passed and done.checks[0].comparisons[0].reader == "transformers"
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    # e4m3 moves a weight by 2⁻⁴ of its size at most; a wrong scale or block moves logits by their own size.
    found, expected = logits(again), logits(model)
    assert (found - expected).float().std() < 0.15 * expected.float().std()


@pytest.mark.parametrize("bits", [{}, {"load_in_4bit": True}], ids=["as it is", "4 bits asked for"])
def test_what_was_written_is_loaded_and_trained_here(tmp_path, bits, caplog):
    """By the stored weights, in 16 bits; a model saved again is no fp8 one."""
    model = trained(tiny_model("qwen2", dtype=torch.bfloat16))
    save_merged(model, tiny_tokenizer(), tmp_path / "out", "fp8", verify=False)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    with caplog.at_level("WARNING", logger="pronghorn"):
        again, tokenizer = FastLanguageModel.from_pretrained(
            str(tmp_path / "out"), dtype=torch.bfloat16, **bits
        )
    assert "stored in fp8 blocks and is dequantised to torch.bfloat16" in caplog.text
    assert ("export --to merged_16bit" in caplog.text) == bool(bits)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), stock.parameters(), strict=True))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    adapted = FastLanguageModel.get_peft_model(again, r=4)
    ids = torch.tensor([[3, 4, 5, 6]])
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    save_merged(adapted, tokenizer, tmp_path / "plain", "merged_16bit", verify=False)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_codes_and_scales_are_the_merged_weights(tmp_path):
    model = trained(tiny_model("qwen2", hidden_size=128, intermediate_size=256))
    save_merged(model, None, tmp_path / "out", "fp8", verify=False)
    tensors = stored(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    # The keys' and values' 32 rows are the smallest side.
    assert config == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
        "modules_to_not_convert": ["lm_head"],
    }
    exact = {entry.name: entry.make() for entry in plan_merge(model, torch.float32).entries}
    quantised = [name for name in tensors if name.endswith("_scale_inv")]
    assert len(quantised) == 14
    for name in quantised:
        weight, codes, scales = (
            exact[name.removesuffix("_scale_inv")],
            tensors[name.removesuffix("_scale_inv")],
            tensors[name],
        )
        assert codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
        assert scales.shape == (weight.shape[0] // 32, weight.shape[1] // 32)
        step = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
        # Half a step: 2⁻⁴ of a normal number, 2⁻¹⁰ of the scale below 2⁻⁶.
        assert ((value(codes, scales) - weight).abs() <= weight.abs() * 2**-4 + step * 2**-10).all()
    for name in tensors.keys() - set(quantised) - {name.removesuffix("_scale_inv") for name in quantised}:
        assert torch.equal(tensors[name], exact[name]), name


def test_an_adapter_smaller_than_the_steps_is_not_called_lost(tmp_path):
    model = trained(tiny_model("llama"), target_modules=["v_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.02)
    assert save_merged(model, tiny_tokenizer(), tmp_path / "out", "fp8").checks[0].passed


def test_blocks():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight[:32, :32] = 0
    weight[40, 70] = 1000.0
    codes, scales = quantise_blocks(weight, 32)
    assert (
        scales.shape == (2, 3)
        and scales[0, 0] == 1.0
        and torch.isclose(scales[1, 2] * 448, torch.tensor(1000.0))
    )
    assert torch.equal(scales, block_scales(weight, 32))
    assert not codes.float().isnan().any() and value(codes, scales)[40, 70] == pytest.approx(1000.0)


@pytest.mark.parametrize("sizes, side", [((256, 384), 128), ((192, 576), 64), ((96, 160), 32)])
def test_the_largest_block_that_divides_all(tmp_path, sizes, side):
    hidden, inner = sizes
    model = tiny_model(
        "llama", hidden_size=hidden, intermediate_size=inner, head_dim=side, num_attention_heads=1,
        num_key_value_heads=1, num_hidden_layers=1,
    )  # fmt: skip
    save_merged(model, None, tmp_path / "out", "fp8", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [side, side]
    assert config["dtype"] == "float32"


def test_what_has_no_fp8_form_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(NotExportable, match=r"divides all linear layers \(.*80"):
        save_merged(tiny_model("llama", intermediate_size=80), None, tmp_path / "out", "fp8")
    with pytest.raises(NotExportable, match="mixture of experts"):
        save_merged(tiny_mixture("mixtral"), None, tmp_path / "out", "fp8")
    assert not list(tmp_path.iterdir())
