"""Weights read by our threads are those that Transformers reads."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pronghorn.errors import CheckpointCorrupt
from pronghorn.loading import FastLanguageModel, pretrained
from pronghorn.loading.reading import WeightReader
from pronghorn.loading.source import locate
from tests.families.mixtures import MIXTURES
from tests.loading.stored import logits
from tests.tiny import save_tiny

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path):
    """Two files with tensors of no element, of one, and of several pieces of 64 bytes."""
    generator = torch.Generator().manual_seed(1)
    first = {
        "matrix": torch.randn(37, 5, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "flags": torch.rand(129, generator=generator) > 0.5,
    }
    second = {"codes": torch.randint(0, 256, (8, 8), generator=generator).to(torch.uint8)}
    save_file(first, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    return [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], first | second


def same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found, expected)


@pytest.mark.parametrize("piece", [1, 64, 1 << 20])
def test_every_tensor_of_every_file(files, piece):
    paths, expected = files
    with WeightReader(CPU, piece=piece) as reader:
        stored = reader.open(paths)
        assert stored.keys() == expected.keys()
        for name, tensor in expected.items():
            assert stored[name].get_shape() == list(tensor.shape)
            same(stored[name][...], tensor)


def test_many_readers_at_once(files):
    paths, expected = files
    with WeightReader(CPU, piece=16) as reader, ThreadPoolExecutor(8) as pool:
        stored = reader.open(paths)
        names = [*expected] * 20
        for name, found in zip(names, pool.map(lambda name: stored[name][...], names), strict=True):
            same(found, expected[name])


def test_a_file_that_became_shorter(files):
    paths, _ = files
    with WeightReader(CPU) as reader:
        stored = reader.open(paths)
        with paths[1].open("r+b") as file:
            file.truncate(paths[1].stat().st_size - 3)
        with pytest.raises(OSError, match="3 bytes early"):
            stored["codes"][...]


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets"),
    [
        ("F32", [2, 2], [[0, 16], [8, 24]]),
        ("F32", [2, 2], [[-16, 0], [0, 16]]),
        ("F32", [2, 2], [[0, 16], [32, 48]]),
        ("F32", [2, 2], [[0, 16], [32, 16]]),
        ("F32", [2, -2], [[0, 16], [16, 32]]),
        ("F32", [2, 3], [[0, 16], [16, 32]]),
        ("F64", [2, 2], [[0, 16], [16, 32]]),
    ],
)
def test_a_header_that_names_other_bytes_is_refused(tmp_path, dtype, shape, offsets):
    entries = {str(n): {"dtype": dtype, "shape": shape, "data_offsets": at} for n, at in enumerate(offsets)}
    header = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with WeightReader(CPU) as reader, pytest.raises(CheckpointCorrupt, match=r"model\.safetensors"):
        reader.open([path])
    with pytest.raises(SafetensorError):
        load_file(path)


@pytest.fixture
def ours(monkeypatch):
    """`pretrained` takes the CPU for a GPU and any model for a large one; the readers it makes are counted."""
    made = []

    def reader(device):
        made.append(device)
        return WeightReader(device, piece=1000)

    monkeypatch.setattr(pretrained, "WORTH_IT", 0)
    monkeypatch.setattr(pretrained, "one_gpu", lambda device_map: CPU)
    monkeypatch.setattr(pretrained, "WeightReader", reader)
    return made


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3_moe"])
def test_a_model_is_the_same_either_way(tmp_path, ours, family):
    folder = save_tiny(tmp_path / "base", family, **MIXTURES.get(family, {}))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = AutoConfig.from_pretrained(folder)
    model, info = pretrained.from_pretrained(
        AutoModelForCausalLM, locate(folder), config=config, dtype=torch.float32, device_map=None
    )
    assert len(ours) == 1
    assert not any(info.values())
    expected = stock.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        same(tensor, expected[name])
    assert model.config.to_dict() == stock.config.to_dict()
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert (model.name_or_path, model.config.name_or_path) == (stock.name_or_path, stock.config.name_or_path)
    assert not model.training


@pytest.mark.parametrize("bits", [4, 16])
def test_loaded_and_quantised(tmp_path, ours, monkeypatch, bits):
    folder = save_tiny(tmp_path / "base", "llama")
    arguments = {"dtype": torch.float32, "load_in_4bit": bits == 4}
    model, _ = FastLanguageModel.from_pretrained(folder, **arguments)
    assert len(ours) == 1
    monkeypatch.setattr(pretrained, "one_gpu", lambda device_map: None)
    stock, _ = FastLanguageModel.from_pretrained(folder, **arguments)
    assert len(ours) == 1
    assert torch.equal(logits(model), logits(stock))


def test_another_dtype_is_left_to_transformers(tmp_path, ours):
    folder = save_tiny(tmp_path / "base", "llama")
    model, _ = FastLanguageModel.from_pretrained(folder, dtype=torch.bfloat16, load_in_4bit=False)
    assert not ours and model.dtype == torch.bfloat16


def test_a_file_that_cannot_be_read_is_named_in_the_caller(tmp_path, ours, monkeypatch):
    folder = save_tiny(tmp_path / "base", "llama")

    def fails(*arguments):
        raise OSError("Input/output error")

    before = set(threading.enumerate())
    monkeypatch.setattr("pronghorn.loading.reading._fill", fails)
    with pytest.raises(CheckpointCorrupt, match="Input/output error"):
        FastLanguageModel.from_pretrained(folder, dtype=torch.float32, load_in_4bit=False)
    for thread in set(threading.enumerate()) - before:  # also those of Transformers that wait for our pieces
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_while_it_is_busy(files):
    paths, expected = files
    device = torch.device("cuda", 0)
    with WeightReader(device, piece=64) as reader:
        stored = reader.open(paths)
        for _ in range(20):
            # Memory of a tensor that a running kernel still writes to is given out again.
            torch.ones(37 * 5 * 1000, device=device).mul_(3).cumsum(0)
            for name, tensor in expected.items():
                same(stored[name][...].clone().cpu(), tensor)
