"""`pronghorn.kernels.fast_linear_forward`: every kind of linear module against the formula in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pronghorn.kernels import fast_linear_forward


def adapted(linear: nn.Module, **options: Any) -> Any:
    """PEFT's layer around a linear, with A and B non-zero."""
    model = nn.Sequential(linear)
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["0"]} | options)
    wrapped = get_peft_model(model, config).base_model.model[0]
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return wrapped


def expected(wrapped: Any, x: torch.Tensor) -> torch.Tensor:
    base = getattr(wrapped, "base_layer", wrapped)
    y = x @ base.weight.to(x.dtype).T + (0 if base.bias is None else base.bias.to(x.dtype))
    if hasattr(wrapped, "lora_A"):
        a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
        y = y + wrapped.scaling["default"] * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T
    return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
def test_values_and_gradients(bias, lora, shape):
    torch.manual_seed(0)
    linear = nn.Linear(12, 7, bias=bias, dtype=torch.float64)
    module = adapted(linear).double() if lora else linear
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = fast_linear_forward(module, x)
    truth = expected(module, x)
    torch.testing.assert_close(y, truth)
    dy = torch.randn_like(truth)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    for ours, theirs in zip(
        torch.autograd.grad(y, wanted, dy), torch.autograd.grad(truth, wanted, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_buffers():
    torch.manual_seed(0)
    module = adapted(nn.Linear(12, 7))
    x = torch.randn(2, 5, 12)
    out, temp = torch.empty(2, 5, 7), torch.empty(2, 5, 3)
    found = fast_linear_forward(module, x, temp, out)
    assert found is out and not found.requires_grad
    torch.testing.assert_close(out, expected(module, x))
    torch.testing.assert_close(temp, x @ module.lora_A["default"].weight.T)


def test_what_the_products_do_not_cover_runs_its_own_forward():
    module = adapted(nn.Linear(12, 7), use_dora=True)
    x = torch.randn(5, 12, requires_grad=True)
    y = fast_linear_forward(module, x)
    torch.testing.assert_close(y, module(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(module(x).sum(), x)[0])


@pytest.mark.parametrize("double", [False, True])
def test_four_bits(double, device):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compress_statistics=double)
    linear = linear.to(device)
    dense = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    x = torch.randn(5, 64, device=device)
    torch.testing.assert_close(fast_linear_forward(linear, x), x @ dense.T, rtol=1e-4, atol=1e-4)
