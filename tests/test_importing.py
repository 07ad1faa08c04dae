"""Imports that pause the garbage collector leave it as they found it."""

import gc
import subprocess
import sys
import weakref
from importlib import import_module
from pathlib import Path

import pytest

from pronghorn.importing import collector_paused, left_out_of_collections

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def as_found():
    was_on = gc.isenabled()
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable() if was_on else gc.disable()


def test_it_is_off_inside_and_on_again_after_an_error():
    gc.enable()
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()  # the outer one still holds
    assert gc.isenabled()
    with pytest.raises(ImportError), collector_paused():
        import_module("pronghorn.nothing")
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off():
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()


def test_what_was_made_inside_is_old_but_can_be_collected():
    gc.enable()
    with collector_paused():
        loop: list = []
        loop.append(loop)
    assert any(found is loop for found in gc.get_objects(generation=2))
    assert gc.get_freeze_count() == 0


def test_what_was_frozen_stays_frozen():
    gc.enable()
    gc.freeze()
    frozen = gc.get_freeze_count()
    with collector_paused():
        pass
    assert 0 < gc.get_freeze_count() <= frozen


def test_garbage_of_before_waits_and_that_of_inside_does_not():
    gc.enable()
    gc.collect()

    class Loop:
        def __init__(self):
            self.own = self

    before = weakref.ref(Loop())
    with left_out_of_collections():
        inside = weakref.ref(Loop())
        gc.collect()
        assert before() is not None and inside() is None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert before() is None


def test_public_names_are_imported_without_it():
    code = """
import sys, gc
sys.path[:0] = ["src"]
import pronghorn
runs = []
gc.callbacks.append(lambda phase, info: runs.append(phase))
from pronghorn import FastLanguageModel
found = len(runs)
assert "torch" in sys.modules and gc.isenabled() and found == 0, found
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert "ok" in done.stdout, done.stderr[-2000:]
