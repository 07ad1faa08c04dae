"""The facts that the doctor tells, and that each check can fail."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pronghorn.diagnostics import (
    attention_checks,
    doctor,
    kernel_checks,
    machine_checks,
    quantised_checks,
    recurrent_checks,
    training_checks,
)
from pronghorn.diagnostics.checks import Check, NotHere, Unsound, perform
from pronghorn.diagnostics.compare import excess
from pronghorn.diagnostics.live import peak_bytes
from pronghorn.memory import host

PACKAGE = Path(doctor.__file__).resolve().parents[1]


def test_facts():
    report = doctor.report()
    versions = {item.name: item.version for item in report.packages}
    assert versions["torch"]
    assert not report.missing
    assert {"compute dtype", "Triton kernels", "packed attention", "model families"} <= {
        p.name for p in report.paths
    }
    assert all(item.reason for item in report.paths)
    assert "Llama" in next(item.value for item in report.paths if item.name == "model families")


def test_a_missing_package_is_reported(monkeypatch):
    def version(name):
        if name == "trl":
            raise doctor.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    report = doctor.report()
    assert [item.name for item in report.missing] == ["trl"]


def spoil(function, which: int | None):
    """The same function with one output (one of several, or the only one) wrong in one element."""

    def spoiled(*args, **kwargs):
        found = function(*args, **kwargs)
        tensor = found if which is None else found[which]
        raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        place = tuple(size // 2 for size in raw.shape)
        raw[place] = 97 if raw.dtype == torch.uint8 else float(raw[place]) + 3.0
        return found

    return spoiled


#: check, module with the kernel, the kernel, which output is spoiled, what the reason names
BROKEN = [
    ("rms_norm", "norm_kernels", "rms_norm_forward", 0, "y in"),
    ("rms_norm", "norm_kernels", "rms_norm_backward", 0, "dx in"),
    ("rms_norm", "norm_kernels", "rms_norm_backward", 1, "dweight in"),
    ("rope", "rope_kernels", "qk_rope_forward", 1, "k in"),
    ("rope", "rope_kernels", "qk_rope_backward", 0, "dq in"),
    ("rope_with_norms", "rope_kernels", "qk_rope_backward", 3, "dk_norm in"),
    ("glu", "glu_kernels", "glu_forward", None, "silu in"),
    ("glu", "glu_kernels", "glu_backward", 2, "dsilu in"),
    ("glu_with_adapters", "glu_kernels", "glu_forward_down", 1, "act Aᵀ in"),
    ("lora_products", "lora_kernels", "up", 1, "Y in"),
    ("lora_products", "lora_kernels", "output_grads", None, "dXA in"),
    ("lora_products", "lora_kernels", "accumulate_a_", None, "dA in"),
    ("four_bit", "nf4_kernels", "dequantize_4bit", None, "weight in"),
    ("lora_products", "lora_kernels", "output_grads_and_start", 1, "dXA A in"),
    ("joined_gradients", "joined_kernels", "unrotate_joined", 2, "dV in"),
    ("fp8_rows", "norm_kernels", "rms_norm_backward_fp8", 0, "dx in"),
    ("glu_in_products", "glu_products", "gate_up_act", 2, "act in"),
    ("glu_in_products", "glu_products", "gate_up", 0, "gate again"),
    ("adapted_products", "adapted_kernels", "multiply", None, "Y in"),
    ("int8_rows", "int8_kernels", "quantise_rows", 0, "int8 codes of rows"),
    ("int8_rows", "int8_kernels", "rms_norm_forward_int8", 0, "the norm"),
    ("int8_products", "int8_kernels", "quantise_weight_input_grad", 0, "a turned weight"),
    ("int8_products", "int8_kernels", "product", None, "Y in"),
    ("fp8_weights", "fp8_kernels", "transpose_codes", None, "turned codes"),
    ("fp8_rows", "norm_kernels", "rms_norm_forward_fp8", 0, "the norm"),
]


@pytest.mark.parametrize("check,module,kernel,which,named", BROKEN)
def test_a_wrong_element_is_found(monkeypatch, check, module, kernel, which, named):
    checks = kernel_checks if hasattr(kernel_checks, check) else quantised_checks
    kernels, function = getattr(checks, module), getattr(checks, check)
    function()
    monkeypatch.setattr(kernels, kernel, spoil(getattr(kernels, kernel), which))
    with pytest.raises(Unsound) as failed:
        function()
    assert named in str(failed.value)


@pytest.mark.parametrize(
    ("kernel", "named"),
    [("short_conv_step", "y in"), ("delta_rule_step", "read in"), ("delta_rule_continued", "continued in")],
)
def test_a_wrong_token_of_linear_attention_is_found(monkeypatch, kernel, named):
    monkeypatch.setattr(recurrent_checks, kernel, spoil(getattr(recurrent_checks, kernel), None))
    with pytest.raises(Unsound, match=named):
        recurrent_checks.delta_step()


def test_every_kernel_that_training_calls_has_a_check():
    """Public functions with a Triton version (`impl`), of the modules that something outside of kernels/ imports."""
    sources = [
        path.read_text() for path in PACKAGE.rglob("*.py") if not {"kernels", "diagnostics"} & set(path.parts)
    ]
    names = ("decode", "kernel", "mixture", "quantised", "recurrent")
    files = [PACKAGE / "diagnostics" / f"{name}_checks.py" for name in names]
    checks = "".join(path.read_text() for path in files)
    missing = []
    for path in sorted((PACKAGE / "kernels").glob("*.py")):
        used = re.compile(
            rf"pronghorn\.kernels\.{path.stem}\b|from pronghorn\.kernels import .*\b{path.stem}\b"
        )
        if path.stem == "dispatch" or not any(map(used.search, sources)):
            continue
        module = import_module(f"pronghorn.kernels.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            kernel = own and "impl" in inspect.signature(function).parameters and name != "fits_kernels"
            if kernel and not re.search(rf"\b{name}\b", checks):
                missing.append(f"{path.stem}.{name}")
    assert not missing, "add these to a file of diagnostics/*_checks.py"


def test_a_wrong_gradient_of_the_head_is_found(monkeypatch):
    right = kernel_checks.head_kernels.linear_cross_entropy

    def wrong(hidden, weight, labels, **kwargs):
        loss, correct = right(hidden * 1.0, weight, labels, **kwargs)
        return loss + 0.01 * (hidden.sum() - hidden.detach().sum()), correct

    monkeypatch.setattr(kernel_checks.head_kernels, "linear_cross_entropy", wrong)
    with pytest.raises(Unsound, match="dhidden"):
        kernel_checks.cross_entropy()


def test_a_wrong_attention_is_found(monkeypatch):
    attention_checks.eager()
    kernels = attention_checks.kernels
    right = kernels.attention_backward

    def wrong(*args):
        dq, dk, dv = right(*args)
        return dq, dk * 1.01, dv

    monkeypatch.setattr(kernels, "attention_backward", wrong)
    with pytest.raises(Unsound, match="dk is off"):
        attention_checks.eager()


def test_a_wrong_gradient_of_the_step_is_named(monkeypatch):
    from pronghorn.blocks import glu

    right = glu.glu_backward

    def wrong(*args, **kwargs):
        act, dgate, dup = right(*args, **kwargs)
        return act, dgate.mul_(0.5), dup

    monkeypatch.setattr(glu, "glu_backward", wrong)
    if torch.cuda.is_available():
        monkeypatch.setattr(glu, "glu_backward_down_", lambda *a, **k: None)
    with pytest.raises(Unsound, match=r"the gradient of .*lora_"):
        training_checks.lora_step()


def test_a_step_that_takes_more_memory_than_the_stock_one_fails(monkeypatch):
    sizes = iter((200, 100))
    monkeypatch.setattr(training_checks, "peak_bytes", lambda device, step: next(sizes) * 2**20)
    with pytest.raises(Unsound, match=r"peak 200.0 MiB .*100.0 MiB"):
        training_checks.lora_step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's allocator counts there")
def test_live_bytes_are_counted_by_hand():
    def step() -> None:
        a = torch.empty(1000)
        b = a * 2
        del a
        _ = b + 1  # 8 kB alive: b and this
        del b

    assert peak_bytes(torch.device("cpu"), step) == 8000


def test_nan_and_wrong_shapes_are_infinitely_wrong():
    exact = torch.ones(3)
    assert excess(exact, exact) == 0.0
    assert excess(torch.tensor([1.0, float("nan"), 1.0]), exact) == float("inf")
    assert excess(torch.ones(4), exact) == float("inf")
    assert excess(exact + 1e-3, exact) > 1.0


def test_a_full_disk_and_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_checks, "cache_folder", lambda: tmp_path)
    room = SimpleNamespace(total=100 * 2**30, used=60 * 2**30, free=40 * 2**30)
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda folder: room)
    assert "40 GiB free in" in machine_checks.disk() and not list(tmp_path.iterdir())

    def refused(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine_checks.tempfile, "NamedTemporaryFile", refused)
    with pytest.raises(Unsound, match="cannot be written: Permission denied"):
        machine_checks.disk()
    room.free = 2**30
    with pytest.raises(Unsound, match=r"1\.0 GiB are free"):
        machine_checks.disk()


def test_a_containers_limit_counts(monkeypatch):
    monkeypatch.setattr(host, "_of_machine", lambda: host.HostMemory(64 * 2**30, 60 * 2**30))
    monkeypatch.setattr(host, "_of_group", lambda: (8 * 2**30, 7 * 2**30))
    with pytest.raises(Unsound, match=r"1\.0 GiB of 8\.0 GiB of this container"):
        machine_checks.host_memory()
    monkeypatch.setattr(host, "_of_group", lambda: (None, 0))
    assert "60.0 GiB of 64.0 GiB of the machine" in machine_checks.host_memory()


def test_a_system_that_does_not_tell_what_is_available_is_not_called_full(monkeypatch):
    monkeypatch.setattr(host, "Path", lambda path: SimpleNamespace(is_file=lambda: False))
    monkeypatch.setattr(host, "_of_group", lambda: (None, 0))
    monkeypatch.setattr(host.os, "sysconf_names", {"SC_PAGE_SIZE": 30, "SC_PHYS_PAGES": 200}, raising=False)
    monkeypatch.setattr(host.os, "sysconf", lambda name: 4096, raising=False)
    with pytest.raises(NotHere):
        machine_checks.host_memory()


def test_an_error_in_a_check_is_its_failure(monkeypatch):
    def failing() -> str:
        raise RuntimeError("CUDA error: invalid configuration argument\nmore")

    monkeypatch.setattr(kernel_checks, "glu", failing)
    result = perform(Check("kernels", "glu", "pronghorn.diagnostics.kernel_checks:glu"))
    assert result.status == "FAIL"
    assert result.detail == "RuntimeError: CUDA error: invalid configuration argument"
    assert "triton" in result.fix


def test_what_is_not_here_is_no_failure(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for function in (machine_checks.pinned_memory, machine_checks.host_link, machine_checks.peer_link):
        with pytest.raises(NotHere):
            function()
