"""Mismatches that machines of others have, judged from what would be found there."""

from __future__ import annotations

import dataclasses

import pytest

from pronghorn.diagnostics import version_checks as versions
from pronghorn.diagnostics.checks import NotHere, Unsound

HERE = versions.Build("2.11.0+cu130", "13.0", None, "580.95.05", (13, 0), "the driver is loaded", True)


def but(**changes):
    return dataclasses.replace(HERE, **changes)


def test_ranges_are_those_of_the_project():
    ranges = versions.requirements()
    assert set(ranges["transformers"].split(",")) == {">=5.17", "<6"}
    assert {"torch", "trl", "peft", "bitsandbytes"} <= set(ranges)


@pytest.mark.parametrize(
    "installed,named",
    [
        ({"transformers": "4.57.1"}, "transformers 4.57.1 is outside of >=5.17,<6"),
        ({"transformers": "6.0.0", "torch": "2.11.0+cu130"}, "transformers 6.0.0"),
        ({"torch": "2.9.1+cpu", "peft": "0.10"}, "peft 0.10"),
    ],
)
def test_packages_out_of_range_are_named(installed, named):
    ranges = {"torch": ">=2.10", "transformers": ">=5.17,<6", "peft": ">=0.21"}
    with pytest.raises(Unsound, match="is outside of") as failed:
        versions.judge_packages(ranges, installed)
    assert named in str(failed.value) and "pip install" in failed.value.fix


def test_packages_in_range():
    assert "torch 2.11.0+cu130" in versions.judge_packages({"torch": ">=2.10"}, {"torch": "2.11.0+cu130"})


def test_a_cpu_build_beside_a_card():
    assert "no NVIDIA card" in versions.judge_build(but(cuda=None, card=None))
    with pytest.raises(Unsound, match="built for the CPU alone, but the driver is loaded"):
        versions.judge_build(but(cuda=None))
    assert "CUDA 13.0" in versions.judge_build(HERE)


def test_drivers():
    assert "driver 580.95.05 runs CUDA up to 13.0" in versions.judge_driver(HERE)
    with pytest.raises(
        Unsound, match=r"driver 535.1 runs CUDA up to 12.2, and torch .* is built for CUDA 13.0"
    ):
        versions.judge_driver(but(driver="535.1", driver_cuda=(12, 2), available=False))
    assert "newer tools" in versions.judge_driver(but(driver_cuda=(13, 0), cuda="13.1"))
    with pytest.raises(Unsound, match=r"libcuda\.so\.1"):
        versions.judge_driver(but(driver=None, driver_cuda=None, available=False))
    with pytest.raises(Unsound, match="torch sees no GPU"):
        versions.judge_driver(but(available=False))
    with pytest.raises(NotHere):
        versions.judge_driver(but(cuda=None))
    with pytest.raises(NotHere):
        versions.judge_driver(but(card=None, driver_cuda=None))


@pytest.mark.parametrize(
    "capability,built_for,runs",
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_86", "sm_90"], True),  # code for 8.0 runs on 8.9
        ((12, 0), ["sm_80", "sm_90", "sm_100"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # PTX is compiled by the driver
        ((6, 1), ["sm_75", "sm_80"], False),
        ((10, 3), ["sm_100a"], False),
        ((10, 0), ["sm_100a"], True),
        ((9, 0), [], False),
    ],
)
def test_architectures(capability, built_for, runs):
    if runs:
        assert versions.judge_architecture(capability, built_for, "2.11") in built_for
    else:
        with pytest.raises(Unsound, match=rf"compute capability {capability[0]}\.{capability[1]}"):
            versions.judge_architecture(capability, built_for, "2.11")


def test_triton():
    assert "as torch asks" in versions.judge_triton("3.6.0", "==3.6.0", (9, 0))
    assert versions.judge_triton("3.6.0", None, (9, 0)) == "triton 3.6.0"
    with pytest.raises(Unsound, match=r"triton 3.9.0 is installed, and torch asks for ==3.6.0"):
        versions.judge_triton("3.9.0", "==3.6.0", (9, 0))
    with pytest.raises(Unsound, match="not installed"):
        versions.judge_triton(None, "==3.6.0", (9, 0))
    with pytest.raises(NotHere):
        versions.judge_triton("3.6.0", None, (6, 1))
