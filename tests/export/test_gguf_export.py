"""A GGUF file, opened by stock Transformers (and by llama.cpp where it is installed), is the trained model."""


import pytest
import torch
from gguf import GGUFReader, dequantize

from pronghorn.export import save_gguf
from pronghorn.export.gguf.methods import Method
from tests.export.test_merged import logits, trained
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

#: Most mean KL divergence of a tiny random model, in nats: ten times what a right file shows, a hundredth of what a
#: forgotten adapter, a wrong permutation or a wrong head does.
CLOSE = {"f32": 1e-7, "f16": 1e-5, "bf16": 3e-4, "q8_0": 2e-3, "q5_1": 5e-2, "q4_0": 0.2}


def fields(path):
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensors(path):
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def weight(path, name):
    found = tensors(path)[name]
    return torch.from_numpy(dequantize(found.data, found.tensor_type).copy())


def export(model, folder, method="f32", **arguments):
    return save_gguf(model, tiny_tokenizer(), folder, method, **arguments)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_is_the_trained_model_again(tmp_path, family, tied):
    model = trained(tiny_model(family, tie_word_embeddings=tied))
    expected = logits(model)
    done = export(model, tmp_path / "out", ["f32", "q8_0"])
    assert [file.name for file in done.files] == ["out.F32.gguf", "out.Q8_0.gguf"]
    for method, found in zip(("f32", "q8_0"), done.checks, strict=True):
        assert found.passed and found.adapted == 14
        assert all(item.divergence < CLOSE[method] for item in found.comparisons)
    assert ("output.weight" in tensors(done.files[0])) is not tied
    assert torch.equal(logits(model), expected)  # still there, unmerged


@pytest.mark.parametrize("method", CLOSE)
def test_every_format_is_as_close_as_its_bits(tmp_path, method):
    done = export(trained(tiny_model("llama")), tmp_path / "out", method)
    assert all(item.divergence < CLOSE[method] for item in done.checks[0].comparisons)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(done.files[0]).items()}
    assert kinds["blk.0.ffn_down.weight"] == method.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["output.weight"] == ("Q8_0" if method.startswith(("q4", "q5")) else method.upper())
    assert fields(done.files[0])["general.file_type"] == Method(method).file_type
