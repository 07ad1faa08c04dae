"""A merged checkpoint, loaded by stock Transformers, is the trained model."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from pronghorn.errors import ExportDiffers, PronghornError, SaveFailed, UnknownArgument
from pronghorn.export import save_adapter, save_gguf, save_merged
from pronghorn.export.merge import plan_merge
from pronghorn.export.merged import parse_size
from pronghorn.loading import FastLanguageModel
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

IDS = torch.tensor(
    [[1, 17, 90, 33, 250, 7, 300, 12, 45, 46, 47, 2], [1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]
)

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "some layers": {"layers_to_transform": [1], "target_modules": ["up_proj", "o_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 64}},
}


def trained(model, seed=0, **arguments):
    """An adapter model whose every trained weight has moved away from its start."""
    model = FastLanguageModel.get_peft_model(model, **{"r": 4, "lora_alpha": 8, **arguments})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def reload(path, dtype=torch.float32):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def written(path):
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found.update({name: tensors.get_slice(name) for name in tensors.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    "family, kind",
    # A bias of the adapter needs one in the base layer, which Qwen2 has. The other families differ in names alone.
    [("qwen2", kind) for kind in KINDS]
    + [(family, "lora") for family in ("llama", "gemma", "gemma3_text", "phi3", "granite")],
)
def test_merged_logits_are_the_trained_models(tmp_path, family, kind):
    base = tiny_model(family)
    plain = logits(base)
    model = trained(base, **KINDS[kind])
    expected = logits(model)
    save_merged(model, tiny_tokenizer(), tmp_path / "out")
    # One more rounding to fp32 a weight (2^-24), through sums of at most 128 terms of size 1: below 1e-5.
    torch.testing.assert_close(logits(reload(tmp_path / "out")), expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-2  # the adapter does something
    assert torch.equal(logits(model), expected)  # and is still there, unmerged
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "kind, double", [("lora", False), ("lora", True), ("dora", True), ("head", True), ("bias", True)]
)
def test_an_nf4_base_is_dequantised_and_merged(tmp_path, kind, double):
    path = save_tiny(tmp_path / "base", "qwen2")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(path), dtype="float32", load_in_4bit=True, bnb_4bit_use_double_quant=double
    )
    model = trained(model, **KINDS[kind])
    save_merged(model, tokenizer, tmp_path / "out")
    merged = reload(tmp_path / "out")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)


def test_an_8_bit_base_is_dequantised(tmp_path):
    path = save_tiny(tmp_path / "base", "llama")
    model, _ = FastLanguageModel.from_pretrained(str(path), dtype="float32", load_in_8bit=True)
    model = trained(model)
    save_merged(model, None, tmp_path / "out")
    torch.testing.assert_close(logits(reload(tmp_path / "out")), logits(model), atol=1e-5, rtol=1e-5)


def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(tmp_path):
    model = trained(tiny_model("llama", dtype=torch.bfloat16))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * (b.double() @ a.double())
    save_merged(model, None, tmp_path / "out")
    merged = reload(tmp_path / "out", torch.bfloat16)
    weight = merged.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.bfloat16
    # Half a unit in the last place of bf16's 8 bits, and before it fp32's error of sums of size 1.
    assert ((weight.double() - exact).abs() <= exact.abs() * 2**-8 + 2**-20).all()
    assert {part.get_dtype() for part in written(tmp_path / "out").values()} == {"BF16"}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_bf16_adapter_is_multiplied_out_in_fp32():
    model = trained(tiny_model("llama", dtype=torch.bfloat16)).to(torch.bfloat16)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * (b.double() @ a.double())
    entries = {entry.name: entry for entry in plan_merge(model).entries}
    merged = entries["model.layers.0.self_attn.q_proj.weight"].make()
    # Half a unit in the last place (2⁻⁸ of the power of two below), and before it fp32's error of sums of size 1.
    unit = torch.exp2(exact.abs().log2().floor())
    assert ((merged.double() - exact).abs() <= unit * 2**-8 + 2**-20).all()


def test_a_weight_beyond_float16_is_refused(tmp_path):
    model = trained(tiny_model("llama", dtype=torch.float16))
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.mul_(1e6)
    with pytest.raises(SaveFailed, match=r"layers\.1\.mlp\.up_proj\.weight .* range of float16"):
        save_merged(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path):
    model = trained(tiny_model("llama", tie_word_embeddings=True))
    save_merged(model, None, tmp_path / "out")
    assert "lm_head.weight" not in written(tmp_path / "out")
    merged = reload(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_trained_half_of_a_tie_breaks_it_in_the_checkpoint(tmp_path, whole):
    model = trained(tiny_model("llama", tie_word_embeddings=True), modules_to_save=whole)
    expected = logits(model)
    save_merged(model, None, tmp_path / "out")
    merged = reload(tmp_path / "out")
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert model.config.tie_word_embeddings  # the model in memory is as it was


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_lora_on_a_half_of_a_tie(tmp_path, targets):
    """PEFT's own adapters of head and embedding, which are not trained whole."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model("qwen2", tie_word_embeddings=True),
        LoraConfig(r=4, target_modules=targets, init_lora_weights=False),
    )
    expected = logits(model)
    done = save_merged(model, tiny_tokenizer(), tmp_path / "out")
    assert done.checks[0].passed and done.checks[0].adapted == 3
    merged = reload(tmp_path / "out")
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"]])
def test_what_is_trained_whole_is_looked_for(tmp_path, monkeypatch, whole):
    model = trained(tiny_model("llama"), modules_to_save=whole, target_modules=["q_proj"])
    done = save_merged(model, tiny_tokenizer(), tmp_path / "out")
    assert done.checks[0].adapted == 3  # two layers' q_proj, and one whole
    monkeypatch.setattr("pronghorn.export.merge._trained_copy", lambda wrapper: wrapper.original_module)
    with pytest.raises(ExportDiffers):
        save_merged(model, tiny_tokenizer(), tmp_path / "lost")


def test_untouched_tensors_are_those_of_the_checkpoint_byte_for_byte(tmp_path):
    path = save_tiny(tmp_path / "base", "qwen2", dtype=torch.bfloat16)
    model, tokenizer = FastLanguageModel.from_pretrained(str(path), dtype="bfloat16", load_in_4bit=False)
    model = trained(model, target_modules=["q_proj"], layers_to_transform=[1])
    save_merged(model, tokenizer, tmp_path / "out")
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = "model.layers.1.self_attn.q_proj.weight"
    assert before.keys() == after.keys() and not torch.equal(before.pop(changed), after.pop(changed))
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize(
    "source, method",
    [(source, "merged_16bit") for source in ("nf4", "int8", "fp8", "gguf")]
    + [("nf4", "fp8"), ("gguf", "fp8")],
)
def test_every_storage_of_the_base_is_dequantised_right(tmp_path, source, method):
    path = save_tiny(tmp_path / "base", "llama")
    how = {
        "nf4": {"load_in_4bit": True},
        "int8": {"load_in_int8": True},
        "fp8": {"load_in_fp8": True, "fp8_skip_layers": 0},
    }
    if source == "gguf":
        pytest.importorskip("gguf")
        path = save_gguf(
            tiny_model("llama"), tiny_tokenizer(), tmp_path / "base.gguf", "q8_0", verify=False
        ).files[0]
    model, tokenizer = FastLanguageModel.from_pretrained(str(path), dtype="float32", **how.get(source, {}))
    model = trained(model)
    done = save_merged(model, tokenizer, tmp_path / "out", method)
    assert done.checks[0].passed and done.checks[0].adapted == 14


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux counts it"
)
@pytest.mark.parametrize("method", ["merged_16bit", "fp8"])
def test_host_memory_stays_within_two_shards(tmp_path, method):
    shard = 4_000_000
    model = tiny_model("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=12, head_dim=64)
    model = trained(model.to(torch.bfloat16))
    size = sum(parameter.nbytes for parameter in model.parameters())
    save_merged(model, None, tmp_path / "warm", method, shard, verify=False)

    def measured(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = measured("VmRSS:")
    done = save_merged(model, None, tmp_path / "out", method, shard, verify=False)
    grown = measured("VmHWM:") - before
    assert len(list(done.folder.glob("*.safetensors"))) > 3 and size > 5 * shard
    assert grown <= 2 * shard, f"{grown:,} bytes"


def test_a_published_generation_config_that_transformers_would_not_save_comes_along(tmp_path):
    model = trained(tiny_model("llama"))
    settings = model.get_base_model().generation_config
    settings.do_sample, settings.temperature, settings.top_p = False, 0.6, 0.9
    save_merged(model, tiny_tokenizer(), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found["temperature"] == 0.6 and found["top_p"] == 0.9
    assert reload(tmp_path / "out").generation_config.temperature == 0.6


def test_merge_and_unload_gives_the_same_weights(tmp_path):
    model = trained(tiny_model("llama"))
    save_merged(model, None, tmp_path / "out")
    merged = reload(tmp_path / "out")
    plain = model.merge_and_unload()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


def test_shards_and_their_index(tmp_path):
    model = trained(tiny_model("llama"))
    save_merged(model, None, tmp_path / "out", max_shard_size="100KB")
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 1 and all(file.stat().st_size < 120_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(written(tmp_path / "out"))
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in tiny_model("llama").parameters())
    torch.testing.assert_close(logits(reload(tmp_path / "out")), logits(model), atol=1e-5, rtol=1e-5)


def test_tokenizer_and_generation_settings_come_along(tmp_path):
    model = trained(tiny_model("llama"))
    model.get_base_model().generation_config.max_new_tokens = 7
    save_merged(model, tiny_tokenizer(), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert reload(tmp_path / "out").generation_config.max_new_tokens == 7


def test_a_model_without_adapter_is_saved_as_it_is(tmp_path):
    model = tiny_model("qwen3")
    save_merged(model, None, tmp_path / "out")
    torch.testing.assert_close(logits(reload(tmp_path / "out")), logits(model), atol=0, rtol=0)


def test_an_adapter_that_is_merged_already_is_not_added_twice(tmp_path):
    model = trained(tiny_model("llama"))
    expected = logits(model)
    model.merge_adapter()
    save_merged(model, None, tmp_path / "out")
    torch.testing.assert_close(logits(reload(tmp_path / "out")), expected, atol=1e-4, rtol=1e-4)


def test_two_active_adapters_are_both_merged(tmp_path):
    from peft import LoraConfig

    model = trained(tiny_model("llama"))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    save_merged(model, None, tmp_path / "both")
    torch.testing.assert_close(logits(reload(tmp_path / "both")), expected, atol=1e-5, rtol=1e-5)
    model.set_adapter("second")
    save_merged(model, None, tmp_path / "one")
    torch.testing.assert_close(logits(reload(tmp_path / "one")), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_a_model_of_an_unknown_family_merges(tmp_path, targets):
    """all-linear: the experts are parameters, which PEFT wraps one inside the other."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = trained(MixtralForCausalLM(config), target_modules=targets)
    expected = logits(model)
    done = save_merged(model, None, tmp_path / "out")
    assert (
        done.checks[0].adapted == {2: 2, 10: 6}[len(targets)]
    )  # all: q, k, v, o and the experts' two stacks
    torch.testing.assert_close(logits(reload(tmp_path / "out")), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Transformers puts 4-bit checkpoints on the GPU")
def test_merged_4bit_is_the_merged_model_in_nf4(tmp_path):
    model = trained(tiny_model("llama"))
    save_merged(model, tiny_tokenizer(), tmp_path / "nf4", save_method="merged_4bit")
    save_merged(model, None, tmp_path / "plain")
    stored = FastLanguageModel.from_pretrained(str(tmp_path / "nf4"), dtype="float32")[0]
    made = FastLanguageModel.from_pretrained(
        str(_with_tokenizer(tmp_path / "plain")),
        dtype="float32",
        load_in_4bit=True,
    )[0]
    torch.testing.assert_close(logits(stored), logits(made), atol=1e-5, rtol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nf4", "plain"]


def test_layers_that_bitsandbytes_cannot_run_on_a_cpu_stay_in_16_bits(tmp_path):
    """Four outputs, of blocks of 32."""
    model = trained(
        tiny_model("qwen3_5_text", dtype=torch.bfloat16), target_modules=["in_proj_a", "in_proj_qkv"]
    )
    done = save_merged(model, tiny_tokenizer(), tmp_path / "nf4", save_method="merged_4bit")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    linear = "model.layers.0.linear_attn"
    assert config["llm_int8_skip_modules"] == ["lm_head", f"{linear}.in_proj_a", f"{linear}.in_proj_b"]
    assert not done.failed


def _with_tokenizer(path):
    tiny_tokenizer().save_pretrained(path)
    return path


def test_the_method_on_the_instance(tmp_path):
    path = save_tiny(tmp_path / "base", "llama")
    model, tokenizer = FastLanguageModel.from_pretrained(str(path), dtype="float32")
    model = trained(model)
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, save_method="merged_16bit")
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), logits(model), atol=1e-5, rtol=1e-5)
    model.save_pretrained_merged(str(tmp_path / "adapter"), tokenizer, save_method="lora")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(UnknownArgument, match="did you mean 'merged_16bit'"):
        model.save_pretrained_merged(str(tmp_path / "x"), tokenizer, save_method="merged_16bits")
    assert not (tmp_path / "x").exists()


def test_without_a_tokenizer_the_bases_own_is_saved(tmp_path, caplog):
    path = save_tiny(tmp_path / "base", "llama")
    model = trained(FastLanguageModel.from_pretrained(str(path), dtype="float32", load_in_4bit=False)[0])
    for method in ("merged_16bit", "lora"):
        model.save_pretrained_merged(str(tmp_path / method), save_method=method)
        assert (
            AutoTokenizer.from_pretrained(tmp_path / method).chat_template == tiny_tokenizer().chat_template
        )
    assert f"the one of {path} is saved" in caplog.text
    shutil.rmtree(path)
    done = model.save_pretrained_merged(str(tmp_path / "alone"))
    assert done.checks[0].passed and not (tmp_path / "alone" / "tokenizer.json").exists()
    assert "none is saved" in caplog.text


@pytest.mark.parametrize("where", ["place_for_second", "_open"])
def test_where_a_second_model_has_no_room_it_is_said_and_nothing_is_marked(
    tmp_path, monkeypatch, caplog, where
):
    def short(*arguments):
        if where == "_open":
            raise torch.OutOfMemoryError

    monkeypatch.setattr(f"pronghorn.export.checkpoint_gate.{where}", short)
    done = save_merged(trained(tiny_model("llama")), tiny_tokenizer(), tmp_path / "out")
    assert done.checks[0].passed and not done.checks[0].comparisons and "not compared" in str(done.checks[0])
    assert "the memory is too small" in caplog.text and not (tmp_path / "out" / "export.failed.txt").exists()


def test_a_template_that_refuses_a_question_alone_is_no_obstacle(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    done = save_merged(trained(tiny_model("llama")), tokenizer, tmp_path / "out")
    assert done.checks[0].passed and done.checks[0].comparisons


def test_what_has_no_merged_form_is_refused_before_anything_is_written(tmp_path):
    from peft import LoraConfig, get_peft_model

    tokens = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4])
    )
    dora = trained(tiny_model("llama"), use_dora=True)
    dora.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    dora.base_model.set_adapter(["default", "second"])
    for model in (tokens, dora):
        with pytest.raises(SaveFailed, match="save_method='lora'"):
            save_merged(model, None, tmp_path / "out")
    with pytest.raises(SaveFailed, match="no adapter"):
        save_adapter(tiny_model("llama"), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size, expected", [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("12", 12), (7, 7)])
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["5 boxes", "", 0, "-1GB", "0GB"])
def test_no_size(size):
    with pytest.raises(PronghornError):
        parse_size(size)


def test_a_change_that_16_bits_cannot_hold_is_said_and_no_failure(tmp_path, caplog):
    """What a run of a step or two leaves: the merged weight rounds back to the base's."""
    model = FastLanguageModel.get_peft_model(tiny_model("llama", dtype=torch.bfloat16), r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 2e-5, generator=torch.Generator().manual_seed(0))
    with caplog.at_level("WARNING", "pronghorn"):
        assert save_merged(model, tiny_tokenizer(), tmp_path / "merged").checks[0].passed
    assert any("less than 16 bits can hold" in record.getMessage() for record in caplog.records)


def test_an_adapter_that_was_forgotten_is_found(tmp_path, monkeypatch):
    model = trained(tiny_model("llama", dtype=torch.bfloat16))
    plain = plan_merge(tiny_model("llama", dtype=torch.bfloat16))
    monkeypatch.setattr("pronghorn.export.merged.plan_merge", lambda model: plain)
    with pytest.raises(ExportDiffers, match="14 of 14 adapted weights lost their adapter"):
        save_merged(model, tiny_tokenizer(), tmp_path / "merged")
