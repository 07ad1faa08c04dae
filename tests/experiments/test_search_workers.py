"""Workers side by side: one base for all of a place, one process's results, whoever dies."""

from __future__ import annotations

import logging
import multiprocessing
import os
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pronghorn.engine import binding_of
from pronghorn.engine.planning import plan_with_expanded, shape_of_config
from pronghorn.errors import SearchFailed, SearchInvalid
from pronghorn.experiments.search import Space, search, sharing, workers
from pronghorn.experiments.search.footprint import Footprint
from pronghorn.experiments.search.sharing import SharedBase, share
from pronghorn.experiments.search.worker import Loader, Place
from pronghorn.experiments.search.workers import Deaths, _Crew, check_room, places
from pronghorn.loading import FastLanguageModel
from pronghorn.memory import Batch, rates_of
from pronghorn.memory.plan import leanest
from pronghorn.weights import join_tensors
from tests.experiments.searches import SPACE, OnlyHere, first_killed, load, load_and_note, task
from tests.families.mixtures import MIXTURES
from tests.loading.stored import adapted, gradients, logits
from tests.tiny import save_tiny, tiny_config, tiny_model


def losses(result: Any) -> dict[str, Any]:
    return {str(trial.settings): (trial.status, trial.loss) for trial in result.trials}


@pytest.fixture(scope="module", autouse=True)
def server():
    """Imports what a worker needs while other tests run, and gives processes that have it: each would import for ten
    seconds otherwise. None where there is a GPU, which a forked process could not use."""
    if torch.cuda.is_available():
        yield None
        return
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["pronghorn.experiments.search.worker", "tests.experiments.searches"])
    server.ensure_running()
    yield server
    server._stop()


@pytest.fixture
def started_sooner(server, monkeypatch):
    """Workers come of the server; what they are given is pickled for it as for processes that begin anew."""

    def context(kind: str) -> Any:
        assert kind == "spawn"
        return multiprocessing.get_context("forkserver")

    if server is not None:
        monkeypatch.setattr(forkserver, "connect_to_new_process", server.connect_to_new_process)
        monkeypatch.setattr(workers, "multiprocessing", SimpleNamespace(get_context=context))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process comes to."""
    return losses(search(task(), Space(SPACE), tmp_path_factory.mktemp("alone")))


# --- one base in several processes


_TIED = {"tie_word_embeddings": True}
_MIXTURE = MIXTURES["qwen3_moe"]
#: family, its config, how it is loaded
STORED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}),
    "bf16, tied": ("qwen2", _TIED, {"dtype": "bfloat16"}),
    "nf4": ("llama", {}, {"load_in_4bit": True}),
    "nf4 in int8": ("llama", {}, {"load_in_4bit": True, "load_in_int8": True}),
    "bitsandbytes int8": ("llama", {}, {"load_in_8bit": True}),
    "int8": ("llama", {}, {"load_in_int8": True}),
    "fp8": ("llama", {}, {"load_in_fp8": True, "fp8_skip_layers": 0}),
    "experts": ("qwen3_moe", _MIXTURE, {}),
    "experts in nf4": ("qwen3_moe", _MIXTURE, {"load_in_4bit": True}),
}


@pytest.mark.parametrize("kind", STORED)
def test_a_base_is_opened_whatever_it_is_stored_in(kind, tmp_path):
    family, config, given = STORED[kind]
    folder = save_tiny(tmp_path, family, head_dim=32, **config)
    given = {"dtype": "float32", "load_in_4bit": False, **given}
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **given)
    before = logits(model)
    base, _ = share(model, tokenizer)
    opened, its_tokenizer = base.open()
    assert binding_of(opened).bound and binding_of(opened).model is opened
    assert its_tokenizer("one")["input_ids"] == tokenizer("one")["input_ids"]
    assert torch.equal(before, logits(model)) and torch.equal(before, logits(opened))
    mine, theirs = gradients(adapted(model)), gradients(adapted(opened))
    assert (
        all(torch.equal(value, theirs[name]) for name, value in mine.items()) and mine.keys() == theirs.keys()
    )
    embedding, head = opened.get_input_embeddings().weight, opened.get_output_embeddings().weight
    assert (embedding is head) == (config is _TIED)
    # What is in the file is all there is: it holds every weight, and no weight but for what trials add is elsewhere.
    assert base.size <= os.fstat(base.memory).st_size < base.size + 64 * 2000
    base.close()


def test_the_memory_is_one_and_what_a_process_writes_is_its_own():
    model = tiny_model("llama")
    base, _ = share(model, None)
    opened, _ = base.open()
    weights = [m.model.layers[1].mlp.down_proj.weight for m in (model, opened)]
    assert all(
        torch.equal(weight, tiny_model("llama").model.layers[1].mlp.down_proj.weight) for weight in weights
    )
    os.pwrite(base.memory, b"\0" * os.fstat(base.memory).st_size, 0)
    assert not any(weight.any() for weight in weights), "both see what is written to the file"
    with torch.no_grad():
        weights[1].add_(1.0)
    assert not weights[0].any() and not base.open()[0].model.layers[1].mlp.down_proj.weight.any()
    base.close()


def test_a_file_that_cannot_be_filled_is_let_go_of(monkeypatch):
    def fails(*arguments: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(sharing, "_write", fails)
    model, before = tiny_model("llama"), len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no space left"):
        share(model, None)
    assert len(os.listdir("/proc/self/fd")) == before
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def test_shared_weights_are_not_moved():
    """Each process would get a copy of them."""
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    base, _ = share(model, None)
    opened = base.open()[0].model.layers[0].self_attn
    base.close()
    for one in (attention, opened):
        assert not join_tensors([one.q_proj.weight, one.k_proj.weight])


def test_a_plan_counts_weights_that_are_elsewhere_nowhere():
    shape, batch = shape_of_config(tiny_config("llama"), storage="nf4 double"), Batch(64, 64, 1)
    here, elsewhere = (
        leanest(replace(shape, elsewhere=told), batch, rates_of("H200")) for told in (False, True)
    )
    assert elsewhere.weights == 0 < here.weights
    assert here.allocated - elsewhere.allocated == here.weights
    there = replace(shape, elsewhere=True)
    # 4-bit weights that are also kept as their products multiply them are this process's own.
    assert plan_with_expanded(there, 2**30, batch, rates_of("H200"), 0).estimate.weights > 0


# --- workers


def test_workers_on_one_base_come_to_what_one_process_does_though_one_dies(
    alone, started_sooner, tmp_path, caplog
):
    """The one that has loaded the base is killed, with which the other is ended; two new ones go on."""
    killed = partial(first_killed, tmp_path)
    with caplog.at_level(logging.WARNING):
        result = search(task(load=load_and_note, metric=killed), Space(SPACE), tmp_path / "search", workers=2)
    assert losses(result) == alone and result.adapter.is_dir()
    assert sorted(trial.number for trial in result.trials) == [0, 1, 2, 3]
    said = caplog.text
    assert said.count("exit code -9: killed") == 1 and said.count("the process with its base is gone") == 1
    assert said.count("2 workers share the host's memory of") == said.count("besides the base") == 2
    seen = {tuple(line.split()) for line in (tmp_path / "where").read_text().splitlines()}
    loaded = [count for _, count, _ in seen]
    assert loaded.count("1") == 2 and loaded.count("0") >= 1, "two bases were loaded, one after the other"
    files = {file for _, _, file in seen}
    assert len(files) == 2 and all(file.isdigit() for file in files), "and each was in one file for all"


class Remote:
    """The process that searches, as a worker sees it."""

    def __init__(self) -> None:
        self.bases: list[SharedBase] = []
        self.reasons: list[str] = []

    def hand(self, base: SharedBase) -> None:
        self.bases.append(base)

    def keep(self, reason: str) -> None:
        self.reasons.append(reason)


def test_where_a_base_cannot_be_shared_a_worker_loads_its_own(monkeypatch):
    def note(what: Any) -> tuple[Any, Any]:
        model, tokenizer = load()
        model.note = what
        return model, tokenizer

    place, remote = Place(None, 2), Remote()
    loader = Loader(lambda: note(lambda: None), place, remote, None, hands=True)
    assert loader()[0].note() is None and not loader.held
    assert not remote.bases and remote.reasons[0].startswith("it cannot be handed over (")
    base, _ = share(*note(OnlyHere()))
    monkeypatch.setattr(os, "getpid", lambda: 0)
    loader = Loader(load, place, remote, base, hands=False)
    assert torch.equal(loader()[0].lm_head.weight, load()[0].lm_head.weight)
    assert remote.reasons[1:] == ["it cannot be opened in another process (RuntimeError: no peer access)"]
    monkeypatch.setattr(os, "memfd_create", None)
    monkeypatch.delattr(os, "memfd_create")
    Loader(load, place, remote, None, hands=True)()
    assert remote.reasons[2:] == ["it cannot be handed over (OSError: this system has no anonymous files)"]


def crew_of_two(monkeypatch: Any, alive: bool, said: Any) -> _Crew:
    """Workers at trials 0 and 1, the second on the first's base; it says something, or has ended (EOFError)."""

    def recv() -> Any:
        if isinstance(said, BaseException):
            raise said
        return said

    def worker(number: int) -> Any:
        process = SimpleNamespace(
            join=lambda *_: None, is_alive=lambda: alive and number == 0, exitcode=None if alive else -9
        )
        return SimpleNamespace(
            ready=True, resting=False, handed=number == 0, borrows=number == 1, job=(number, {}),
            process=process, connection=SimpleNamespace(recv=recv), stop=lambda: None,
        )  # fmt: skip

    crew = _Crew(None, None, SimpleNamespace(), 2)  # type: ignore[arg-type]
    (party,) = crew._parties
    party.workers, party.open = [worker(0), worker(1)], True
    connections = [[party.workers[1].connection], []]
    monkeypatch.setattr(workers, "wait", lambda _: connections.pop(0))
    monkeypatch.setattr(_Crew, "_fill", lambda *_: None)
    with suppress(IndexError):
        crew.run()
    return crew


GPU_ERROR = RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize(
    "said", [("raised", (GPU_ERROR,)), ("record", (None,)), EOFError(), ConnectionRefusedError()]
)
def test_a_worker_whose_base_is_gone_is_not_believed(monkeypatch, said):
    """Its memory may be anything by then: an error of the GPU, a score, or its own end are the other's end."""
    crew = crew_of_two(monkeypatch, alive=False, said=said)
    (party,) = crew._parties
    assert not party.workers and not party.open
    assert [crew._deaths.next() for _ in range(3)] == [(1, {}), (0, {}), None], (
        "both trials are run once more"
    )


def test_a_worker_s_end_is_its_own_while_the_base_is_there(monkeypatch):
    crew = crew_of_two(monkeypatch, alive=True, said=EOFError())
    (party,) = crew._parties
    assert [worker.handed for worker in party.workers] == [True] and party.open
    assert [crew._deaths.next() for _ in range(2)] == [(1, {}), None]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        crew_of_two(monkeypatch, alive=True, said=("raised", (GPU_ERROR,)))


def test_a_base_that_a_process_dies_of_is_not_opened_again(monkeypatch, caplog):
    monkeypatch.setattr(_Crew, "_fill", lambda *_: None)
    crew = _Crew(None, None, None, 3)  # type: ignore[arg-type]
    (party,) = crew._parties
    party.open, party.base = True, share(*load())[0]
    for _ in range(2):
        process = SimpleNamespace(exitcode=-11)
        late = SimpleNamespace(
            ready=False, borrows=True, handed=False, process=process, stop=lambda: None, resting=False
        )
        party.workers = [late]  # type: ignore[list-item]
        crew._lost(party, late)  # type: ignore[arg-type]
    assert party.base is None and party.open and not party.workers
    said = [record.message for record in caplog.records]
    assert (
        len(said) == 2 and "base of its own: a process that opened" in said[0] and "exit code -11" in said[0]
    )
    assert said[1].startswith("pronghorn: 3 workers share the host's memory; what"), "looked at once more"


def test_when_nothing_is_left_nobody_is_waited_for(monkeypatch):
    """Those that have yet to begin are ended, and then those whose bases they would have opened, on every GPU."""
    ended: list[str] = []

    def worker(name: str, **state: Any) -> Any:
        made = {"ready": True, "resting": False, "handed": False, "borrows": False, **state}
        return SimpleNamespace(
            **made, dismiss=lambda: ended.append(name), stop=lambda: ended.append(f"{name}!")
        )

    monkeypatch.setattr(workers, "places", lambda count: [Place("a", 2), Place("b", 2), Place("c", 2)])
    crew = _Crew(None, None, None, 6)  # type: ignore[arg-type]
    late = {"ready": False, "borrows": True}
    first, second, third = (worker(name, handed=True) for name in ("first", "second", "third"))
    second.resting = True
    for party, found in zip(
        crew._parties, ([first, worker("a", **late)], [second, worker("b", **late)], [third]), strict=True
    ):
        party.workers = found
    crew._ended(crew._parties[0], first)
    assert ended == ["a!", "first", "b!", "second"]
    assert [(len(party.workers), party.wanted) for party in crew._parties] == [(0, 0), (0, 1), (1, 2)]


def test_workers_need_what_a_process_can_be_given(tmp_path):
    with pytest.raises(SearchInvalid, match="cannot be given this"):
        search(task(load=lambda: None), Space(SPACE), tmp_path, workers=2)


def test_a_trial_whose_process_dies_is_run_once_more(caplog):
    told: list[Any] = []
    referee, deaths = SimpleNamespace(record=told.append), Deaths()
    worker = SimpleNamespace(ready=True, job=(3, {"r": 4}), process=SimpleNamespace(exitcode=-9))
    deaths.mourn(worker, referee)
    assert deaths.next() == (3, {"r": 4}) and deaths.next() is None and not told
    assert "trial 3 is run once more: its process ended with exit code -9: killed" in caplog.text
    deaths.mourn(worker, referee)
    assert deaths.next() is None
    assert (told[0].number, told[0].status) == (3, "failed") and told[0].reason.startswith("twice, ")
    worker.job = None
    deaths.mourn(worker, referee)
    assert len(told) == 1, "between two trials nothing is lost"
    worker.ready = False
    with pytest.raises(SearchFailed, match="a worker could not begin"):
        deaths.mourn(worker, referee)


def test_a_trial_ended_with_another_s_process_is_not_held_against_it(caplog):
    deaths = Deaths()
    for _ in range(3):
        deaths.interrupted((3, {"r": 4}))
        assert deaths.next() == (3, {"r": 4})
    deaths.interrupted(None)
    assert deaths.next() is None and "trial 3 is run once more" in caplog.text


def test_workers_that_do_not_fit_are_refused(caplog):
    found, base = Footprint({2: 8 << 30, 4: 9 << 30, 8: 10 << 30}, 20 << 30), SharedBase(b"", 0, 6 << 30)
    check_room(Place("GPU-1", 2), found, None)
    assert "one GPU of 20.00 GiB: 10.00 GiB at least are predicted" in caplog.text
    with pytest.raises(
        SearchInvalid, match=r"3 workers share one GPU of 20.00 GiB, .*Fix: 2 there at most, or smaller micro"
    ):
        check_room(Place("GPU-1", 3), found, None)
    check_room(Place("GPU-1", 3), found, base)
    assert "and a base of 6.00 GiB: besides the base 4.00 GiB at least" in caplog.text
    with pytest.raises(
        SearchInvalid,
        match=r"besides the base 4.00 GiB at least.*Fix: 3 there at most, or search micro-batches up to 4",
    ):
        check_room(Place("GPU-1", 4), found, base)


def test_places_and_their_parts_of_a_gpu(monkeypatch):
    assert places(3) == [Place(None, 3)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"{index}{index}")
    )
    assert places(3) == [Place("GPU-00", 2), Place("GPU-11", 1)] and places(1) == [Place("GPU-00", 1)]
    parts: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", parts.append)
    Place("GPU-00", 2).limit_memory()
    Place("GPU-00", 2).limit_memory(20)
    Place("GPU-00", 2).limit_memory(20, here=False)
    Place("GPU-11", 1).limit_memory(20)
    assert parts == [0.5, 0.625, 0.375], "of 80, 20 shared: 20 + 30, and 30"
