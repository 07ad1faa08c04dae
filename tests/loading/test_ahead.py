"""What is begun early is begun, ends with its block, and fails nothing."""

import logging
import os
import threading
from types import SimpleNamespace

import pytest
import torch

from pronghorn.errors import CheckpointCorrupt
from pronghorn.loading import FastLanguageModel, ahead, fast
from pronghorn.loading.ahead import begun_early
from pronghorn.loading.model import gpu_in_sight
from tests.tiny import save_tiny

needs_advice = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")


def ended():
    for thread in threading.enumerate():
        if thread.name == "pronghorn-ahead":
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def asked(monkeypatch):
    """(name of the file, first byte) of each piece that the system is asked for."""
    pieces = []

    def advise(file, at, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED and length == 100
        pieces.append((os.path.basename(os.readlink(f"/proc/self/fd/{file}")), at))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(ahead, "_PIECE", 100)
    return pieces


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, size in zip(paths, (250, 100), strict=True):
        path.write_bytes(bytes(size))
    return paths


@needs_advice
def test_files_are_asked_for_piece_by_piece(files, asked):
    with begun_early(files, None):
        ended()
    assert asked == [("a", 0), ("a", 100), ("a", 200), ("b", 0)]


@needs_advice
def test_not_more_than_memory_holds(files, asked, monkeypatch):
    monkeypatch.setattr(ahead, "available_host_bytes", lambda: 699)
    with begun_early(files, None):
        ended()
    assert asked == []


@needs_advice
def test_nothing_more_is_asked_for_once_the_block_is_over(files, asked, monkeypatch):
    first, over, record = threading.Event(), threading.Event(), os.posix_fadvise

    def slow(*arguments):
        record(*arguments)
        first.set()
        assert over.wait(10)

    monkeypatch.setattr(os, "posix_fadvise", slow)
    with begun_early(files, None):
        assert first.wait(10)
    over.set()
    ended()
    assert asked == [("a", 0)]


def test_the_end_of_a_block_waits_for_the_device(monkeypatch):
    made, go_on = [], threading.Event()

    def slow(size, device):
        assert go_on.wait(10)
        made.append(device)

    monkeypatch.setattr(ahead, "torch", SimpleNamespace(empty=slow))
    with begun_early([], torch.device("cpu")):
        assert not made
        go_on.set()
    assert made == [torch.device("cpu")]


def test_what_goes_wrong_is_logged_and_no_more(tmp_path, monkeypatch, caplog):
    def fails(size, device):
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(ahead, "torch", SimpleNamespace(empty=fails))
    with (
        caplog.at_level(logging.DEBUG, "pronghorn"),
        begun_early([tmp_path / "missing"], torch.device("cpu")),
    ):
        ended()
    assert "no memory is left" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_a_system_without_threads_to_give(tmp_path, monkeypatch):
    def refuses(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    with begun_early([tmp_path / "file"], torch.device("cpu")):
        monkeypatch.undo()


@needs_advice
def test_weights_are_asked_for_before_the_config_is_read(tmp_path, asked, monkeypatch):
    folder = save_tiny(tmp_path / "base", "llama")
    read = fast.load_config

    def noting(*arguments):
        ended()
        asked.append("config")
        return read(*arguments)

    monkeypatch.setattr(fast, "load_config", noting)
    FastLanguageModel.from_pretrained(folder, dtype="float32")
    pieces, rest = asked[: asked.index("config")], asked[asked.index("config") :]
    assert pieces == [("model.safetensors", 100 * n) for n in range(len(pieces))] and rest == ["config"]
    assert 100 * len(pieces) >= (folder / "model.safetensors").stat().st_size


def test_a_damaged_file_is_said_before_anything_begins(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "base", "llama")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    monkeypatch.setattr(fast, "begun_early", lambda *given: pytest.fail("begun"))
    with pytest.raises(CheckpointCorrupt):
        FastLanguageModel.from_pretrained(folder, dtype="float32")


@pytest.mark.parametrize(
    ("device_map", "launched", "expected"),
    [
        (None, False, 3),
        ({"": 1}, False, 1),
        ({"": "cuda:2"}, False, 2),
        ({"": "cpu"}, False, None),
        ("auto", False, None),
        (None, True, None),  # each process will take the GPU of its own number
    ],
)
def test_the_gpu_that_is_in_sight(monkeypatch, device_map, launched, expected):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: launched)
    found = gpu_in_sight(device_map, SimpleNamespace(is_cuda=True))
    assert found == (None if expected is None else torch.device("cuda", expected))
    assert gpu_in_sight(device_map, SimpleNamespace(is_cuda=False)) is None
