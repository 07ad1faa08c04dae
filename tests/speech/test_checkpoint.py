"""Published folders in and out: what is read is what was written, and what is wrong is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pronghorn.errors import (
    AdapterMismatch,
    CheckpointCorrupt,
    ModelNotFound,
    UnsupportedCheckpoint,
    WeightsMismatch,
)
from pronghorn.speech import add_speech_adapter, convert_pickle, load_speech, save_speech
from pronghorn.speech.layout import config_of
from pronghorn.speech.names import to_halves, to_pairs
from tests.speech.tiny import FLAT, LAYOUTS, random_tensors, save_speech_tiny, save_tiktoken, shapes


def test_turning_rows_round_and_back():
    rows = torch.arange(16)[:, None]
    assert to_halves(rows, 2)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(to_pairs(to_halves(rows, 2), 2), rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_is_written_as_it_was_read(layout, tmp_path):
    folder = save_speech_tiny(tmp_path / "published", layout, torch.bfloat16)
    model, tokenizer = load_speech(folder)
    assert model.dtype == torch.float32  # on the CPU; the file is of bf16
    again = save_speech(model, tokenizer, tmp_path / "again")
    written, published = (load_file(f / "model.safetensors") for f in (again, folder))
    assert set(written) == set(published) == set(shapes(LAYOUTS[layout]))
    for name, tensor in published.items():
        assert written[name].dtype == torch.bfloat16 and torch.equal(written[name], tensor), name
    assert json.loads((again / "config.json").read_text()) == LAYOUTS[layout]
    load_speech(again)


def test_an_adapter_is_saved_read_and_merged(tmp_path):
    folder = save_speech_tiny(tmp_path / "published")
    model, tokenizer = load_speech(folder)
    adapted = add_speech_adapter(model, r=4, half="slow")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    read, tokenizer = load_speech(tmp_path / "adapter")
    merged = load_file(save_speech(read, tokenizer, tmp_path / "merged") / "model.safetensors")
    published = load_file(folder / "model.safetensors")
    changed = {name for name in published if not torch.equal(merged[name], published[name])}
    ends = ("wqkv.weight", "wo.weight", "w1.weight", "w2.weight", "w3.weight")
    assert changed == {name for name in published if name.startswith("layers.") and name.endswith(ends)}
    ids = torch.tensor([[5, 9, 330, 331, 7]])
    codes = torch.randint(0, FLAT["codebook_size"], (1, FLAT["num_codebooks"], 5))
    plain, _ = load_speech(tmp_path / "merged")
    with torch.no_grad():
        outputs = [m(input_ids=ids, codes=codes, return_logits=True).token_logits for m in (read, plain)]
    # fp32: an adapter beside its weight or inside it.
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    model, _ = load_speech(save_speech_tiny(tmp_path / "one"))
    add_speech_adapter(model, r=4).save_pretrained(tmp_path / "adapter")
    save_speech_tiny(tmp_path / "one", intermediate_size=128)
    with pytest.raises(AdapterMismatch):
        load_speech(tmp_path / "adapter")


def test_pickled_weights_are_converted_by_a_command_alone(tmp_path):
    folder = save_speech_tiny(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        {"state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()}}, folder / "model.pth"
    )
    with pytest.raises(UnsupportedCheckpoint, match="pronghorn speech convert"):
        load_speech(folder)
    written = load_file(convert_pickle(folder))
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    load_speech(folder)


class Harm:
    """Runs a function when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize("content", [Harm(), {"a": Harm()}, {"a": 3}, {}])
def test_a_pickle_of_something_else_is_refused_unread(content, tmp_path):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(UnsupportedCheckpoint, match="PH103"):
        convert_pickle(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_nothing_to_convert(tmp_path):
    with pytest.raises(ModelNotFound):
        convert_pickle(tmp_path)


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (
            lambda t: t.pop("layers.1.attention.wo.weight"),
            WeightsMismatch,
            "first layers.1.attention.wo.weight",
        ),
        (
            lambda t: t.update({"norm.weight": torch.ones(3)}),
            WeightsMismatch,
            "3 rows, config.json asks for 64",
        ),
        (lambda t: t.update({"embeddings.weight": torch.ones(384, 32)}), WeightsMismatch, r"\[384, 32\]"),
    ],
)
def test_weights_that_are_not_the_config_s(damage, error, words, tmp_path):
    folder = save_speech_tiny(tmp_path)
    tensors = random_tensors(FLAT)
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(error, match=words):
        load_speech(folder)


def test_what_the_transformers_do_not_have_is_left_out_and_said(tmp_path, caplog):
    folder = save_speech_tiny(tmp_path)
    save_file(random_tensors(FLAT) | {"audio_projector.weight": torch.ones(2)}, folder / "model.safetensors")
    load_speech(folder)
    assert "1 tensors" in caplog.text and "audio_projector.weight" in caplog.text


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"model_type": "llama"}, UnsupportedCheckpoint, "model type 'llama'"),
        ({"dim": None}, CheckpointCorrupt, "lacks dim"),
        ({"n_local_heads": 3}, CheckpointCorrupt, "4 heads of 16 cannot share 3"),
        ({"attention_qkv_bias": True}, UnsupportedCheckpoint, "biases on q, k, v alone"),
    ],
)
def test_configs_that_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        config_of(FLAT | change, (0, 23))


def test_sizes_that_a_config_leaves_out():
    sparse = {
        k: FLAT[k]
        for k in ("model_type", "vocab_size", "n_layer", "n_head", "dim", "codebook_size", "num_codebooks")
    }
    config = config_of(sparse, (0, 23))
    assert (config.slow.intermediate_size, config.slow.head_dim, config.slow.num_key_value_heads) == (
        256,
        16,
        4,
    )
    assert (config.fast.num_hidden_layers, config.fast.hidden_size, config.fast.vocab_size) == (4, 64, 24)
    assert not config.norm_fastlayer_input and not config.scale_codebook_embeddings


def test_a_folder_with_a_tiktoken_vocabulary(tmp_path):
    folder = save_speech_tiny(tmp_path / "published")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    save_tiktoken(folder)
    model, tokenizer = load_speech(folder)
    again = save_speech(model, tokenizer, tmp_path / "again")
    for name in ("tokenizer.tiktoken", "special_tokens.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_tokenizer_that_is_not_the_model_s(tmp_path):
    folder = save_speech_tiny(tmp_path, vocab_size=330)
    save_file(random_tensors(FLAT | {"vocab_size": 330}), folder / "model.safetensors")
    with pytest.raises(WeightsMismatch, match="semantic tokens go up to"):
        load_speech(folder)


def test_no_folder(tmp_path):
    with pytest.raises(ModelNotFound):
        load_speech("somebody/s1-mini-not-here")
    with pytest.raises(ModelNotFound):
        load_speech(tmp_path / "nowhere")
