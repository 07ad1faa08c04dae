"""Out of memory: what was planned against what was there, and what is advised by the difference."""

from __future__ import annotations

import re

import pytest

from pronghorn.engine import binding_of
from pronghorn.engine.planning import shape_of
from pronghorn.hardware import GpuMemory
from pronghorn.memory import estimate
from pronghorn.training.memory import largest_batch
from pronghorn.training.shortage import shortage
from tests.training.runs import adapter_model, trainer

GIB = 2**30


@pytest.fixture
def run(tmp_path):
    found = trainer(tmp_path, adapter_model(), max_length=4096, per_device_train_batch_size=4)
    binding_of(found.model).set_save_levels("all")
    return found


def planned(run, level="all") -> int:
    return estimate(shape_of(binding_of(run.model)), level, largest_batch(run)).reserved


def test_planned_and_happened_are_told(run):
    error = shortage(run, "Tried to allocate 2.00 GiB", GpuMemory(24 * GIB, GIB, 20 * GIB))
    assert error.code == "PH501"
    expected = f"{planned(run) / GIB:.2f} GiB were to be expected for the largest batch"
    assert expected in error.message and "save levels all" in error.message
    assert "this process had 20.00 of the GPU's 24.00 GiB, others 3.00, 1.00 were free" in error.message


def test_others_on_the_gpu_are_named_first(run):
    error = shortage(run, "x", GpuMemory(24 * GIB, GIB, 20 * GIB))
    assert error.fix.startswith("end what else uses the GPU (3.00 GiB")


def test_more_than_planned_is_told(run):
    need = planned(run)
    error = shortage(run, "x", GpuMemory(10 * need, 0, 10 * need))
    assert "more was reserved than a step needs" in error.fix


def test_the_least_change_that_fits_is_given_with_its_size(run):
    all_of_it, none = planned(run), planned(run, "none")
    assert none < all_of_it
    error = shortage(run, "x", GpuMemory(all_of_it - 1, 0, all_of_it - 1))
    level = re.search(r"use_gradient_checkpointing='(\w+)' takes ([\d.]+) GiB", error.fix)
    assert level and f"{planned(run, level[1]) / GIB:.2f}" == level[2]
    tiny = shortage(run, "x", GpuMemory(none - 1, 0, none - 1))
    assert "load_in_4bit" in tiny.fix or re.search(r"1/\d+ of per_device_train_batch_size", tiny.fix)


def test_where_nothing_is_planned(run):
    binding_of(run.model).undo()
    error = shortage(run, "Tried to allocate 2.00 GiB", GpuMemory(24 * GIB, GIB, 23 * GIB))
    assert "Tried to allocate" in error.message and "memory_budget" in error.fix
    assert "memory ran out" in shortage(run, "x").message
