"""Every way a model on the disk can be wrong, each with its code and a message that names the file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pronghorn.errors import ModelNotFound, PronghornError
from pronghorn.loading import FastLanguageModel
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("whole") / "m", "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("sharded") / "m", "llama", max_shard_size="100KB")


@pytest.fixture
def copy_of(tmp_path):
    def copy(source):
        return shutil.copytree(source, tmp_path / "copy")

    return copy


def refused(path, code, *parts, **arguments):
    with pytest.raises(PronghornError) as caught:
        FastLanguageModel.from_pretrained(str(path), dtype="float32", **arguments)
    assert caught.value.code == code, caught.value
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_missing_folder_suggests_its_sibling(whole):
    refused(whole.parent / "n" / "x", "PH101")
    refused(whole.parent / "mm", "PH101")
    (whole.parent / "llama-3").mkdir(exist_ok=True)
    refused(whole.parent / "lama-3", "PH101", "llama-3")


def test_missing_gguf_file(whole):
    refused("model.gguf", "PH101")
    refused(whole, "PH101", "none.gguf", gguf_file="none.gguf")


def test_empty_folder(tmp_path):
    refused(tmp_path, "PH101", "config.json")


def test_folder_above_the_model(whole):
    refused(whole.parent, "PH101", str(whole))


def test_a_model_and_an_adapter_in_one_folder(copy_of, whole):
    """Transformers would put the adapter on the model beside it, whatever it was trained on."""
    folder = copy_of(whole)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    refused(folder, "PH103", "a whole model and an adapter")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="'elsewhere'"):  # or HubUnreachable, without a network
        FastLanguageModel.from_pretrained(str(folder), dtype="float32")


def test_another_file(whole):
    refused(whole / "config.json", "PH103", str(whole))


def test_a_file_that_only_looks_like_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not it")
    refused(tmp_path / "x.gguf", "PH102", "x.gguf")


def test_a_truncated_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x10" * 12)
    refused(tmp_path / "x.gguf", "PH102", "x.gguf")


def test_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    refused(tmp_path, "PH103", "gguf_file=")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama", "hidden_size": "wide"}', "\ufeff"])
def test_bad_config(copy_of, whole, text):
    path = copy_of(whole)
    (path / "config.json").write_text(text)
    refused(path, "PH102", "config.json")


def test_architecture_that_transformers_lacks(copy_of, whole):
    path = copy_of(whole)
    (path / "config.json").write_text('{"model_type": "gallop"}')
    refused(path, "PH103", "gallop")


def test_an_architecture_that_is_no_language_model(copy_of, whole):
    path = copy_of(whole)
    (path / "config.json").write_text('{"model_type": "vit"}')
    refused(path, "PH103")


def test_remote_code_is_not_run(copy_of, whole):
    path = copy_of(whole)
    (path / "config.json").write_text(
        '{"model_type": "gallop", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}'
    )
    (path / "code.py").write_text("raise SystemExit('ran')")
    refused(path, "PH103", "trust_remote_code=True")


def test_unknown_quantisation(copy_of, whole):
    path = copy_of(whole)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    refused(path, "PH103", "gptq")


def test_pickled_weights(copy_of, whole):
    path = copy_of(whole)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    refused(path, "PH103", "pytorch_model.bin", "safetensors")


def test_no_weights(copy_of, whole):
    path = copy_of(whole)
    (path / "model.safetensors").unlink()
    refused(path, "PH102", "no weights")


@pytest.mark.parametrize("keep", [0, 5, 100, -1000])
def test_truncated_weights(copy_of, whole, keep):
    path = copy_of(whole)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(path, "PH102", "model.safetensors")


@pytest.mark.parametrize("header", [b"nonsense", b'{"a": 1}', b"[]", b'{"a": {"data_offsets": [0]}}'])
def test_damaged_header(copy_of, whole, header):
    path = copy_of(whole)
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(path, "PH102", "model.safetensors")


def test_missing_shard(copy_of, sharded):
    path = copy_of(sharded)
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(path, "PH102", shard.name)


def test_truncated_shard(copy_of, sharded):
    path = copy_of(sharded)
    shard = sorted(path.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(path, "PH102", shard.name)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_that_leaves_its_folder(copy_of, sharded, place):
    path = copy_of(sharded)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = place
    index.write_text(json.dumps(content))
    refused(path, "PH103", place)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {"a": 1}}'])
def test_damaged_index(copy_of, sharded, text):
    path = copy_of(sharded)
    (path / "model.safetensors.index.json").write_text(text)
    refused(path, "PH102", "index.json")


def test_missing_weight(copy_of, whole):
    path = copy_of(whole)
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, "PH105", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    "family,change,first",
    [
        ("llama", {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight"),
        ("llama", {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight"),
        ("llama", {"model_type": "gemma2"}, "model.layers.0.post_feedforward_layernorm.weight"),
        ("qwen2", {"model_type": "llama"}, "model.layers.0.self_attn.k_proj.bias"),
    ],
    ids=["fewer-layers", "more-layers", "another-family", "biases"],
)
def test_a_config_of_another_model(tmp_path, family, change, first):
    """Weights that would be left out are as wrong as those that would be random."""
    path = save_tiny(tmp_path / "model", family)
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("architectures", "layer_types")}
    (path / "config.json").write_text(json.dumps(config | change))
    refused(path, "PH105", first)


def test_missing_head_of_an_untied_model(copy_of, whole):
    path = copy_of(whole)
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, "PH105", "lm_head.weight")


def test_weight_of_another_shape(copy_of, whole):
    path = copy_of(whole)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 64)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, "PH105")


def test_a_weight_too_many_is_only_said(copy_of, whole, caplog):
    path = copy_of(whole)
    weights = load_file(path / "model.safetensors")
    weights["model.extra.weight"] = torch.zeros(2)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    FastLanguageModel.from_pretrained(str(path), dtype="float32")
    assert "model.extra.weight" in caplog.text


def test_missing_tokenizer(copy_of, whole):
    path = copy_of(whole)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (path / name).unlink(missing_ok=True)
    refused(path, "PH104", "tokenizer")


def test_damaged_tokenizer(copy_of, whole):
    path = copy_of(whole)
    (path / "tokenizer.json").write_text("{}")
    refused(path, "PH104")
