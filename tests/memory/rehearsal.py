"""A training step on the meta device: real sizes, the engine's and the launchers' own allocations, no arithmetic."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from pronghorn.engine import bind, binding_of
from pronghorn.engine.binding import Binding
from pronghorn.engine.flat import lay_out
from pronghorn.engine.read import Reading, read_groups
from pronghorn.kernels import triton as triton_kernels
from pronghorn.kernels.attention import dispatch
from pronghorn.kernels.attention.cudnn_plans import bucket
from pronghorn.memory import offload
from pronghorn.memory.allocator import Allocator
from pronghorn.weights import join, lay_side_by_side
from tests.families.parity import TARGETS
from tests.memory.live import LiveBytes

#: Modules that ask `use_triton` by a name of their own.
_KERNELS = (
    "rms_norm", "layer_norm", "rope", "qkv_grads", "glu", "lora", "linear_cross_entropy", "nf4", "fp8", "int8",
    "latent_heads", "short_conv", "gated_output", "routing", "grouped_adapters", "grouped_glu", "grouped_matmul",
    "grouped_rows", "tiles",
)  # fmt: skip


class _NoLaunch:
    """In place of a Triton kernel: `kernel[grid](...)` does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


class _NoPool:
    """Host memory that is not there: what is parked leaves the device all the same."""

    def take(self, size: int) -> tuple[int, list[Tensor]]:
        return 0, []

    def give_back(self, start: int) -> None:
        pass


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, docs: Any, call: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """FlashAttention-2's own allocations (torch's flash_api.cpp, mha_varlen_bwd)."""
    copies = [x.contiguous() for x in (dout, out)]
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    padded = q.shape[0] + 128 * (rest[1].cu_seqlens.numel() - 1)
    wide = -(-q.shape[2] // 32) * 32
    sums = [q.new_empty(q.shape[1] * padded, dtype=torch.float32)]
    sums.append(q.new_empty(padded, q.shape[1], wide, dtype=torch.float32))
    if q.shape[1] != k.shape[1]:
        sums += [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2)]
    del copies, sums
    return tuple(grads)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, docs: Any, call: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, docs: Any, call: Any
) -> tuple[Tensor, ...]:
    """`kernels.attention.cudnn_ragged`'s allocations, and cuDNN's workspace as it says."""
    copies = [x.contiguous() for x in (q, k, v, dout, out, lse)]
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    most = bucket(docs.count, docs.max_seqlen, q.shape[0])[2]
    size = 4 * most * q.shape[1] * (3 * q.shape[2] + 1)
    workspace = q.new_empty(size, dtype=torch.uint8)
    del copies, workspace
    return tuple(grads)


_ATTENTION = {"flash": (_flash_forward, _flash_backward), "cudnn": (_cudnn_forward, _cudnn_backward)}


def prepare(monkeypatch: pytest.MonkeyPatch, *, parking: bool) -> None:
    """Make the engine run on the meta device as it does on a GPU."""
    monkeypatch.setattr("pronghorn.kernels.dispatch.use_triton", lambda tensor, impl: True)
    for name in _KERNELS:
        module = importlib.import_module(f"pronghorn.kernels.{name}")
        if hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda tensor, impl: True)
    # All are imported before one is changed: some import others' kernels by name.
    names = [found.name for found in pkgutil.iter_modules(triton_kernels.__path__)]
    for module in [importlib.import_module(f"{triton_kernels.__name__}.{name}") for name in names]:
        for attribute, value in list(vars(module).items()):
            if type(value).__name__ in (
                "InterpretedFunction",
                "JITFunction",
                "GluonJITFunction",
                "Heuristics",
            ):
                monkeypatch.setattr(module, attribute, _NoLaunch())
    monkeypatch.setattr("pronghorn.kernels.lora.probe", lambda: SimpleNamespace(capability=(9, 0)))
    monkeypatch.setattr("pronghorn.kernels.triton.launch.processors", lambda index: 132)
    for name in ("glu_hopper", "gemm_hopper", "heads_hopper", "lora_hopper"):
        monkeypatch.setattr(f"pronghorn.kernels.triton.{name}.processors", lambda index: 132)
    for name in ("lora", "lora_grads", "glu_down"):
        monkeypatch.setattr(f"pronghorn.kernels.triton.{name}.limits", lambda device: (132, 227 * 1024))
    monkeypatch.setattr(dispatch, "_implementation", _ATTENTION.__getitem__)
    monkeypatch.setattr(Binding, "attention_backend", lambda self, *args, **kwargs: "flash")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    if parking:
        stream = type("Stream", (), {"wait_stream": lambda *a: None, "wait_event": lambda *a: None})()
        event = type("Event", (), {"record": lambda *a: None})
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", event)
        monkeypatch.setattr(offload, "_matching", lambda pieces, tensors: [])
        monkeypatch.setattr(Binding, "new_stash", lambda self, device: offload.HostStash(stream, _NoPool()))  # type: ignore[arg-type]
    assert "pronghorn.kernels.triton.launch" in sys.modules


def meta_model(config: Any, rank: int = 16, **adapter: Any) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"} | adapter
        adapted = get_peft_model(model, LoraConfig(r=rank, **options))
    bind(adapted, strict=True)
    return adapted.train()


def batch_of(tokens: int, documents: int) -> dict[str, Any]:
    length = tokens // documents
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    bounds = torch.zeros(documents + 1, dtype=torch.int32, device="meta")
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": ids.clone(),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": length,
        "max_length_k": length,
        "loss_rows": torch.zeros(tokens - documents, dtype=torch.int64, device="meta"),
        "num_items_in_batch": tokens - documents,
        "use_cache": False,
    }


def measure(
    model: Any, tokens: int, documents: int, memory: Allocator | None = None, *, steps: int = 2
) -> int:
    """The most bytes alive in forward and backward, beyond the model and its gradients, which lie in buffers of their
    own; `memory` lives through so many steps."""
    peak = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    for _ in range(1 if memory is None else steps):
        batch = batch_of(tokens, documents)
        with LiveBytes(memory) as counter:
            model(**batch).loss.backward()
        peak = max(peak, counter.peak)
    return peak


def joined(model: Any) -> Any:
    """A model's plain weights side by side, as a training step lays them on a GPU."""
    binding = binding_of(model)
    for layer in binding.layers:
        groups = read_groups(layer, binding.family.parts, Reading(True))
        assert all(join([projection.weight for projection in groups[slot]]) for slot in (0, 4))
    return model


class Linear4bit(torch.nn.Module):
    """Sizes of bitsandbytes' module of this name, double quantised."""

    bias = None
    compute_dtype = torch.bfloat16

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        out, width = self.out_features, self.in_features = linear.out_features, linear.in_features
        blocks = out * width // 64
        empty = lambda n, dtype: torch.empty(n, dtype=dtype, device="meta")  # noqa: E731
        second = SimpleNamespace(
            absmax=empty(-(-blocks // 256), torch.float32), code=empty(256, torch.float32), blocksize=256
        )
        state = SimpleNamespace(
            shape=(out, width),
            absmax=empty(blocks, torch.uint8),
            code=empty(16, torch.float32),
            offset=empty(1, torch.float32),
            blocksize=64,
            nested=True,
            state2=second,
            quant_type="nf4",
        )
        self.weight = torch.nn.Parameter(empty((out * width // 2, 1), torch.uint8), requires_grad=False)
        self.weight.quant_state = state


def in_four_bits(model: Any) -> Any:
    """The linear weights under a PEFT model's adapters, replaced."""
    for module in model.modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            module.base_layer = Linear4bit(module.base_layer)
    return model


def in_fp8(model: Any, monkeypatch: pytest.MonkeyPatch, *, stacks: bool = False) -> Any:
    """The linear weights under a PEFT model's adapters as fp8 codes, stored both ways round; groups side by side."""
    from pronghorn.weights.fp8_linear import Fp8Linear

    def product(rows: Any, codes: Tensor, scales: Any, dtype: torch.dtype, **options: Any) -> Tensor:
        return torch.empty(rows[0].shape[0], codes.shape[0], dtype=dtype, device="meta")

    monkeypatch.setattr("pronghorn.weights.fp8.product", product)
    for module in model.modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            out, width = module.base_layer.weight.shape
            codes = torch.empty(out, width, dtype=torch.float8_e4m3fn, device="meta")
            linear = Fp8Linear(codes, torch.empty(out, 1, device="meta"), None, torch.bfloat16)
            linear.weight_transposed = torch.empty(width, out, dtype=codes.dtype, device="meta")
            module.base_layer = linear
    for layer in model.get_base_model().model.layers if stacks else []:
        of, mlp = layer.self_attn, layer.mlp
        for group in ((of.q_proj, of.k_proj, of.v_proj), (mlp.gate_proj, mlp.up_proj)):
            lay_side_by_side([module.base_layer for module in group])
    return model


def in_int8(model: Any, monkeypatch: pytest.MonkeyPatch, copies: int) -> Any:
    """The linear weights under a PEFT model's adapters as int8 codes, groups side by side; with no copies stored in 4
    bits."""
    from pronghorn.weights.four_bit import INT8_BACK_SCALES, INT8_SCALES
    from pronghorn.weights.int8_linear import Int8Linear

    def product(left: Any, right: Any, *, dtype: torch.dtype, out: Any = None, **options: Any) -> Tensor:
        size = left[0].shape[0], right[0].shape[0]
        return torch.empty(size, dtype=dtype, device="meta") if out is None else out

    monkeypatch.setattr("pronghorn.weights.int8.product", product)
    monkeypatch.setattr("pronghorn.weights.int8.transpose_codes", lambda codes: codes.t().contiguous())
    monkeypatch.setattr("pronghorn.weights.int8.four_bit_to_int8", lambda *given, out, **options: out)
    for layer in model.get_base_model().model.layers:
        of, mlp = layer.self_attn, layer.mlp
        groups = (
            (of.q_proj, of.k_proj, of.v_proj),
            (of.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        for group in groups:
            outs, width = [m.base_layer.out_features for m in group], group[0].base_layer.in_features
            empty = lambda *size, dtype=torch.int8: torch.empty(*size, dtype=dtype, device="meta")  # noqa: E731
            codes, scales = empty(sum(outs), width), empty(sum(outs), 1, dtype=torch.float32)
            back, back_scales = empty(width, sum(outs)), empty(width, 1, dtype=torch.float32)
            parts = codes.split(outs), scales.split(outs), back.split(outs, 1)
            for module, part in zip(group, scales.split(outs), strict=True) if not copies else ():
                module.base_layer = Linear4bit(module.base_layer)
                module.base_layer.register_buffer(INT8_SCALES, part.view(torch.uint8))
                module.base_layer.register_buffer(INT8_BACK_SCALES, back_scales.view(torch.uint8))
                module.base_layer.pronghorn_int8_block = 64
            for module, *forward, turned in zip(group, *parts, strict=True) if copies else ():
                other = (turned, back_scales) if copies == 2 else None
                module.base_layer = Int8Linear(tuple(forward), other, None, torch.bfloat16)
    return model


def packed(model: Any) -> Any:
    """A model whose adapters lie side by side, as a training step lays them."""
    binding = binding_of(model)
    groups = {
        (index, slot): projections
        for index, layer in enumerate(binding.layers)
        for slot, projections in binding.groups(layer, Reading(True)).items()
    }
    binding.packed = lay_out(groups, torch.bfloat16)
    assert binding.packed is not None
    return model


def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products around a gated unit make it themselves, and others add their adapters."""
    monkeypatch.setattr("pronghorn.kernels.tiles.why_not", lambda device, dtype: None)
