"""`FastLanguageModel.from_pretrained`: what it loads, in which precision, and what it leaves on the model."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    StableLmConfig,
    StableLmForCausalLM,
    TrainingArguments,
)

from pronghorn.engine import binding_of
from pronghorn.errors import (
    BindingRefused,
    GatedModel,
    HubUnreachable,
    ModelNotFound,
    PackageMissing,
    UnknownArgument,
    UnknownSaveLevel,
)
from pronghorn.hardware import Fact, Hardware, probe
from pronghorn.loading import FastLanguageModel, is_bfloat16_supported, precision
from pronghorn.loading import hub as hub_module
from pronghorn.loading.tokenizer import set_pad_token
from pronghorn.weights import read_weight
from tests.tiny import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

IDS = torch.tensor([[1, 17, 90, 33, 250, 7, 300, 12]])


def load(path, **arguments):
    return FastLanguageModel.from_pretrained(
        str(path), **{"dtype": "float32", "max_seq_length": 128, **arguments}
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_bound_and_predicts_what_the_stock_model_does(tmp_path, family):
    path = save_tiny(tmp_path / family, family)
    model, tokenizer = load(path)
    assert binding_of(model).bound
    assert model.max_seq_length == 128
    assert not model.training
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.testing.assert_close(
        model(IDS, use_cache=False).logits, stock(IDS, use_cache=False).logits, atol=1e-5, rtol=1e-5
    )
    assert tokenizer.pad_token == "<|pad|>"  # its own, and not EOS: left alone


def test_a_sharded_checkpoint_loads(tmp_path):
    path = save_tiny(tmp_path / "m", "qwen2", max_shard_size="100KB")
    assert (path / "model.safetensors.index.json").is_file()
    model, _ = load(path)
    torch.testing.assert_close(model.lm_head.weight, tiny_model("qwen2").lm_head.weight)


def test_tied_embeddings_are_not_taken_for_missing_weights(tmp_path):
    model, _ = load(save_tiny(tmp_path / "m", "llama", tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "asked, expected",
    [
        (None, None),
        ("bf16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_dtype(llama, asked, expected):
    model, _ = load(llama, dtype=asked)
    expected = expected or getattr(torch, probe().compute_dtype.value)
    if not torch.cuda.is_available() or asked is not None:
        assert model.dtype == expected
        assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU takes")
def test_the_notebook_line_for_mixed_precision_is_accepted_without_a_gpu(tmp_path):
    """`fp16=not is_bfloat16_supported(), bf16=is_bfloat16_supported()`: Transformers refuses bf16=True on a CPU."""
    supported = is_bfloat16_supported()
    TrainingArguments(tmp_path, fp16=not supported, bf16=supported)


def test_the_choice_of_dtype_is_logged_with_its_reason(llama, caplog):
    with caplog.at_level(logging.INFO, logger="pronghorn"):
        load(llama, dtype=None)
    assert any("in torch." in message and "(" in message for message in caplog.messages)


@pytest.mark.parametrize("dtype", ["bfloat", "int8", torch.int8])
def test_no_such_dtype(llama, dtype):
    with pytest.raises(UnknownArgument):
        load(llama, dtype=dtype)


def _machine(device, dtype="bfloat16"):
    no = Fact(False, "-")
    return Hardware(device, "-", (9, 0), 0, Fact(dtype, "-"), no, 1)


def test_bits_follow_the_machine_and_the_request(monkeypatch):
    gpu, cpu = _machine("cuda"), _machine("cpu")
    assert precision.choose_bits(None, False, False, gpu)[0] == 4
    assert precision.choose_bits(None, False, False, cpu)[0] == 16
    assert precision.choose_bits(True, False, False, cpu)[0] == 4
    assert precision.choose_bits(None, True, False, gpu)[0] == 8
    assert precision.choose_bits(False, False, False, gpu)[0] == 16
    assert precision.choose_bits(True, False, True, gpu)[0] == 16
    with pytest.raises(UnknownArgument):
        precision.choose_bits(True, True, False, gpu)
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    bits, reason = precision.choose_bits(None, False, False, gpu)
    assert bits == 16 and "bitsandbytes" in reason
    with pytest.raises(PackageMissing):
        precision.choose_bits(True, False, False, gpu)


def test_bf16_on_a_gpu_without_it_is_said(caplog):
    precision.choose_dtype("bfloat16", _machine("cuda", "float16"))
    assert "slow" in caplog.text


@pytest.mark.parametrize("double", [True, False])
def test_nf4_is_bound_and_double_quantisation_is_a_switch(llama, double):
    model, _ = load(llama, load_in_4bit=True, bnb_4bit_use_double_quant=double)
    state = model.model.layers[0].self_attn.q_proj.weight.quant_state
    assert state.quant_type == "nf4" and state.nested is double
    assert binding_of(model).bound
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("double", [True, False])
def test_answering_does_not_change_nf4_weights(llama, double):
    model, _ = load(llama, load_in_4bit=True, bnb_4bit_use_double_quant=double)
    down = model.model.layers[0].mlp.down_proj  # two blocks of scales a row
    before = read_weight(down).dense(torch.float32)
    FastLanguageModel.for_inference(model).generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(read_weight(down).dense(torch.float32), before)


def test_8_bit(llama):
    model, _ = load(llama, load_in_8bit=True)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="Transformers puts 4-bit checkpoints on the GPU: test_gpu.py"
)
def test_a_quantised_checkpoint_stays_as_it_is_and_a_conflict_is_said(llama, tmp_path, caplog):
    model, tokenizer = load(llama, load_in_4bit=True)
    model.save_pretrained(tmp_path / "nf4")
    tokenizer.save_pretrained(tmp_path / "nf4")
    again, _ = load(tmp_path / "nf4", load_in_4bit=False)
    assert "stored in 4 bits" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    caplog.clear()
    load(tmp_path / "nf4")
    assert "stored in 4 bits" not in caplog.text
    bf16, _ = load(tmp_path / "nf4", dtype="bfloat16")
    assert bf16.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


def test_full_finetuning_trains_everything_unquantised(llama):
    model, _ = load(llama, full_finetuning=True, load_in_4bit=True)
    assert all(p.requires_grad for p in model.parameters())
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32


def test_rope_scaling_changes_the_rotation_and_keeps_the_base(llama, caplog):
    plain, _ = load(llama)
    scaled, _ = load(llama, rope_scaling={"type": "linear", "factor": 4.0}, max_seq_length=1024)
    assert "rope_scaling=" not in caplog.text  # the hint for those who give none
    torch.testing.assert_close(scaled.model.rotary_emb.inv_freq * 4, plain.model.rotary_emb.inv_freq)
    assert scaled.max_seq_length == 1024
    load(llama, max_seq_length=1024)
    assert "rope_scaling=" in caplog.text


@pytest.mark.parametrize("scaling", [{"type": "linaer", "factor": 2.0}, {"type": "linear"}, {"factor": 2.0}])
def test_bad_rope_scaling(llama, scaling):
    with pytest.raises(UnknownArgument):
        load(llama, rope_scaling=scaling)


def test_arguments_of_older_scripts_pass_and_unknown_ones_are_refused(llama, caplog):
    with caplog.at_level(logging.INFO, logger="pronghorn"):
        load(llama, fast_inference=False, gpu_memory_utilization=0.5, random_state=1)
    assert sum("changes nothing here" in message for message in caplog.messages) == 1
    with pytest.raises(UnknownArgument, match="did you mean 'load_in_4bit'"):
        load(llama, load_in_4bits=True)


@pytest.mark.parametrize(
    "asked, level",
    [(False, "all"), (True, "none"), ("unsloth", "offload"), ("matmuls", "matmuls")],
)
def test_save_level(llama, asked, level):
    model, _ = load(llama, use_gradient_checkpointing=asked)
    assert binding_of(model).save_levels == (level, level)


def test_no_such_save_level(llama):
    with pytest.raises(UnknownSaveLevel):
        load(llama, use_gradient_checkpointing="unslot")


def test_an_unknown_family_trains_stock_or_is_refused(tmp_path):
    config = StableLmConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    StableLmForCausalLM(config).save_pretrained(tmp_path / "stablelm")
    tiny_tokenizer().save_pretrained(tmp_path / "stablelm")
    model, _ = load(tmp_path / "stablelm", use_gradient_checkpointing=True)
    assert not binding_of(model).bound
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    with pytest.raises(BindingRefused, match="LayerNorm with biases"):
        load(tmp_path / "stablelm", strict=True)


def test_capped_attention_is_computed_by_what_caps(tmp_path):
    """Generation runs Transformers' attention, of which only the eager one knows the cap in every version."""
    model, _ = load(save_tiny(tmp_path / "gemma2", "gemma2"))
    assert model.config._attn_implementation == "eager"


def test_inference_and_training_modes(llama):
    model, _ = load(llama)
    model.config.use_cache = False
    assert FastLanguageModel.for_training(model) is model and model.training
    assert FastLanguageModel.for_inference(model) is model and not model.training
    assert model.config.use_cache
    FastLanguageModel.for_training(model, use_gradient_checkpointing="attention")
    assert set(binding_of(model).save_levels) == {"attention"}


# --- hub ----------------------------------------------------------------------------------------------------------


def test_a_hub_model_is_downloaded_without_pickles_and_loaded_from_disk(llama, monkeypatch):
    asked = {}

    def snapshot(repo_id, **arguments):
        asked.update(arguments, repo_id=repo_id)
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model, _ = load("owner/tiny", revision="v1", token="t")
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("owner/tiny", "v1", "t")
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked["allow_patterns"])
    assert model.name_or_path == "owner/tiny"
    adapted = FastLanguageModel.get_peft_model(model, r=2)
    written = adapted.peft_config["default"]
    assert (written.base_model_name_or_path, written.revision) == ("owner/tiny", "v1")


def test_an_unknown_hub_model_is_one_clear_error(monkeypatch, tmp_path):
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    def refuse(repo_id, **arguments):
        raise LocalEntryNotFoundError("no network and not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="did you mean 'my-model'"):
        load("my-modle")
    with pytest.raises(HubUnreachable, match="no network"):
        load("owner/private")

    def ask_for_terms(repo_id, **arguments):
        raise GatedRepoError("Access is restricted", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", ask_for_terms)
    with pytest.raises(GatedModel, match="Access is restricted") as refused:
        load("owner/gated")
    assert "https://huggingface.co/owner/gated" in refused.value.fix and isinstance(
        refused.value, ModelNotFound
    )
    assert hub_module.download is not None


# --- padding token ------------------------------------------------------------------------------------------------


def test_padding_is_not_eos_when_a_token_is_to_spare(caplog):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with caplog.at_level(logging.INFO, logger="pronghorn"):
        set_pad_token(tokenizer, model)
    assert tokenizer.pad_token == "<|pad|>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert "the EOS token" in caplog.text
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]


def test_padding_stays_eos_when_nothing_is_to_spare(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    set_pad_token(tokenizer, tiny_model("llama"))
    assert tokenizer.pad_token == "</s>"
    assert len(tokenizer) == 3


def test_fix_tokenizer_false_leaves_the_tokenizer(tmp_path):
    path = save_tiny(tmp_path / "m", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(path)
    assert load(path, fix_tokenizer=False)[1].pad_token == "<|end|>"
    assert load(path)[1].pad_token == "<|pad|>"


def test_a_tokenizer_with_more_tokens_than_embeddings_is_said(caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(100)])
    set_pad_token(tokenizer, tiny_model("llama"))
    assert "cannot be used" in caplog.text


@pytest.mark.parametrize("length", [0, -1, "128", True])
def test_a_length_that_is_none(llama, length):
    with pytest.raises(UnknownArgument, match="no number of tokens"):
        load(llama, max_seq_length=length)


def test_rows_stay_within_a_table_of_positions(tmp_path, caplog):
    """Beyond it the lookup fails, in the middle of training; rotated positions only get worse."""
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    assert load(tmp_path / "gpt2")[0].max_seq_length == 64
    assert any("table of 64 positions" in message for message in caplog.messages)
