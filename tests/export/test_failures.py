"""Saving that fails leaves nothing behind and takes nothing away."""

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pronghorn.errors import ExportMismatch, SaveFailed
from pronghorn.export import merged as merged_module
from pronghorn.export import (
    safetensors_file,
    save_adapter,
    save_gguf,
    save_gguf_adapter,
    save_merged,
    verify_export,
)
from pronghorn.export.folder import write_folder
from pronghorn.export.safetensors_file import Entry, write_safetensors
from pronghorn.loading import FastLanguageModel
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def model():
    return FastLanguageModel.get_peft_model(tiny_model("llama"), r=4)


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }


@pytest.fixture(params=["new", "existing"])
def target(request, tmp_path, model):
    """A place to save to; in one of the cases an earlier export stands there."""
    path = tmp_path / "out"
    if request.param == "existing":
        save_merged(tiny_model("llama", seed=7), tiny_tokenizer(), path)
    return path


def test_a_disk_that_is_too_full_is_seen_before_anything_is_written(monkeypatch, target, model):
    before = contents(target.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 95, 5))
    with pytest.raises(SaveFailed, match="bytes are needed, 5 are free") as caught:
        save_merged(model, tiny_tokenizer(), target)
    assert caught.value.code == "PH601" and str(target) in str(caught.value)
    assert contents(target.parent) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_saving(monkeypatch, target, model, number):
    before = contents(target.parent)
    written = []

    def write_then_fail(path, entries):
        write_safetensors(path, entries[:3])
        written.append(path)
        raise OSError(number, "no space")

    monkeypatch.setattr(merged_module, "write_safetensors", write_then_fail)
    with pytest.raises(SaveFailed, match="filled up"):
        save_merged(model, tiny_tokenizer(), target)
    assert written and contents(target.parent) == before


def test_a_tokenizer_that_cannot_be_written(target, model):
    class Tokenizer:
        def save_pretrained(self, path):
            raise OSError(errno.ENOSPC, "no space")

    before = contents(target.parent)
    for save in (save_merged, save_adapter):
        with pytest.raises(SaveFailed):
            save(model, Tokenizer(), target)
    assert contents(target.parent) == before


def test_an_interrupted_save(monkeypatch, target, model):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    before = contents(target.parent)
    monkeypatch.setattr(merged_module, "write_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_merged(model, tiny_tokenizer(), target)
    assert contents(target.parent) == before


def test_a_wrong_tensor_on_the_disk_is_not_put_in_place(monkeypatch, target, model):
    def drop_one(path, entries):
        write_safetensors(path, entries[1:])

    before = contents(target.parent)
    monkeypatch.setattr(merged_module, "write_safetensors", drop_one)
    with pytest.raises(ExportMismatch, match="absent"):
        save_merged(model, tiny_tokenizer(), target)
    assert contents(target.parent) == before


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, model):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveFailed, match="is a file"):
        save_merged(model, None, tmp_path / "file")
    with pytest.raises(SaveFailed, match="cannot be written"):
        save_merged(model, None, tmp_path / "file" / "out")
    assert contents(tmp_path) == {"file": b"x"}


def test_an_adapter_that_peft_put_on_by_itself(tmp_path):
    save_tiny(tmp_path / "base", "llama")
    base, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "base"), load_in_4bit=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    before = contents(tmp_path)
    for verify in (True, False):
        with pytest.raises(SaveFailed, match="inside of PEFT's"):  # PEFT hands the call on to the base
            model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora", verify=verify)
    assert contents(tmp_path) == before
    assert not model.save_pretrained_merged(tmp_path / "merged", tokenizer, verify=False).failed


@pytest.mark.parametrize("name", ["default", "second"])
def test_an_adapter_that_transformers_put_on(tmp_path, name):
    save_tiny(tmp_path / "base", "llama")
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "base"), load_in_4bit=False)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), name)
    done = model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora")
    assert done.checks[0].adapted == 2 and (tmp_path / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("method", ["merged_16bit", "fp8"])
def test_the_adapter_that_was_loaded_is_not_replaced(tmp_path, method):
    save_tiny(tmp_path / "base", "llama")
    base, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "base"), load_in_4bit=False)
    save_adapter(FastLanguageModel.get_peft_model(base, r=4), tokenizer, tmp_path / "adapter", verify=False)
    before = contents(tmp_path / "adapter")
    loaded, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), load_in_4bit=False)
    with pytest.raises(SaveFailed, match="the adapter was loaded from"):
        save_merged(loaded, tokenizer, tmp_path / "adapter", method)
    assert contents(tmp_path / "adapter") == before
    save_adapter(loaded, tokenizer, tmp_path / "adapter", verify=False)  # an adapter may be saved again there
    save_merged(loaded, tokenizer, tmp_path / "merged", method, verify=False)


def test_a_folder_that_must_not_be_taken_the_place_of(monkeypatch, tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    loaded, tokenizer = FastLanguageModel.from_pretrained(str(base), dtype="float32", load_in_4bit=False)
    loaded = FastLanguageModel.get_peft_model(loaded, r=2)
    (tmp_path / "here" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "inner")
    before = contents(tmp_path)
    for method in ("merged_16bit", "lora"):
        for path, message in (
            (base, "loaded from"),
            (tmp_path / "base" / ".." / "base", "loaded from"),
            ("", "no folder"),
            (".", "working directory"),
            (tmp_path / "here", "working directory"),
        ):
            with pytest.raises(SaveFailed, match=message):
                loaded.save_pretrained_merged(path, tokenizer, method)
    assert contents(tmp_path) == before
    save_merged(loaded, tokenizer, "merged", verify=False)
    with pytest.raises(SaveFailed, match="whole model"):
        save_adapter(loaded, tokenizer, "merged")
    save_adapter(loaded, tokenizer, "adapter")
    save_adapter(loaded, tokenizer, "adapter")  # an adapter takes an adapter's place


@pytest.mark.parametrize("method", ["merged_16bit", "lora"])
@pytest.mark.parametrize("text", ["No space left on device (os error 28)", "I/O error: Quota (os error 122)"])
def test_a_full_disk_in_the_words_of_other_libraries(monkeypatch, target, model, method, text):
    class Tokenizer:
        def save_pretrained(self, path):
            raise Exception(text)

    before = contents(target.parent)
    with pytest.raises(SaveFailed, match=r"filled up|whole model"):
        save_merged(model, Tokenizer(), target, method)
    assert contents(target.parent) == before


@pytest.fixture
def small_files():
    """No file grows beyond 30 kB: writes fail as on a disk that fills up, in whatever library they are."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit", "fp8", "lora", "gguf", "gguf lora"])
def test_writes_that_stop_midway_in_every_form(small_files, tmp_path, model, method):
    save = {
        "gguf": lambda path: save_gguf(model, tiny_tokenizer(), path, ["f32", "q8_0"]),
        "gguf lora": lambda path: save_gguf_adapter(model, path),
    }.get(method, lambda path: save_merged(model, None, path, method))
    with pytest.raises(SaveFailed, match="filled up"):
        save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that nobody may write to")
def test_a_folder_that_is_read_only(model):
    with pytest.raises(SaveFailed, match="cannot be written"):
        save_merged(model, None, "/proc/nowhere/out")


def test_a_failing_rename_brings_the_old_export_back(monkeypatch, tmp_path):
    import pronghorn.export.folder as folder_module

    out = tmp_path / "out"
    write_folder(out, 0, lambda folder: (folder / "config.json").write_text("old"))
    replace = folder_module.os.replace

    def fail_on_new(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EBUSY, "busy")
        replace(source, target)

    monkeypatch.setattr(folder_module.os, "replace", fail_on_new)
    with pytest.raises(SaveFailed, match="busy"):
        write_folder(out, 0, lambda folder: (folder / "config.json").write_text("new"))
    assert contents(tmp_path) == {"out": None, "out/config.json": b"old"}


def test_a_new_export_replaces_the_old_one_and_nothing_else(tmp_path, model):
    out = tmp_path / "out"
    save_merged(model, tiny_tokenizer(), out, max_shard_size="100KB")
    (out / "notes.txt").write_text("mine")
    (out / "plots").mkdir()
    (out / "plots" / "loss.png").write_bytes(b"png")
    save_merged(model, None, out)
    names = {p.name for p in out.iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "notes.txt", "plots"}
    assert (out / "plots" / "loss.png").read_bytes() == b"png"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_folders_above_are_made_and_the_result_has_ordinary_permissions(tmp_path, model):
    out = save_adapter(model, tiny_tokenizer(), tmp_path / "a" / "b").folder
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- the file format ----------------------------------------------------------------------------------------------


def entry(name, tensor):
    return Entry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def test_every_dtype_and_odd_shapes_read_back(tmp_path):
    from safetensors.torch import load_file

    tensors = {
        f"{dtype}-{len(shape)}": torch.randint(0, 2, shape).to(dtype)
        for dtype in safetensors_file.DTYPE_NAMES
        for shape in ((), (0, 3), (3,), (5, 7))
    }
    tensors["transposed"] = torch.randn(4, 6).t()
    entries = [entry(name, tensor) for name, tensor in tensors.items()]
    write_safetensors(tmp_path / "x.safetensors", entries)
    verify_export(tmp_path, entries)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name
        assert read[name].dtype == tensor.dtype


def test_memory_holds_one_tensor_at_a_time(tmp_path):
    alive = []

    def make(index):
        def build():
            import weakref

            assert not [ref for ref in alive if ref() is not None], "an earlier tensor is still there"
            tensor = torch.full((1000,), float(index))
            alive.append(weakref.ref(tensor))
            return tensor

        return build

    entries = [Entry(str(i), (1000,), torch.float32, make(i)) for i in range(5)]
    write_safetensors(tmp_path / "x.safetensors", entries)
    assert len(alive) == 5


def test_verify_names_the_first_difference(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", [entry("a", torch.zeros(2)), entry("b", torch.zeros(3))])
    with pytest.raises(ExportMismatch, match=r"b was to be F16 \[3\] and is F32 \[3\]"):
        verify_export(tmp_path, [entry("a", torch.zeros(2)), entry("b", torch.zeros(3).half())])
    file = tmp_path / "x.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ExportMismatch, match=r"x\.safetensors cannot be read back"):
        verify_export(tmp_path, [entry("a", torch.zeros(2))])


def test_an_entry_that_lies_about_its_shape_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        write_safetensors(
            tmp_path / "x.safetensors", [Entry("a", (2,), torch.float32, lambda: torch.zeros(3))]
        )
