"""One training step of a small random model with LoRA: ours beside Transformers' and PEFT's own, and captured."""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pronghorn.diagnostics.checks import NotHere, Unsound
from pronghorn.diagnostics.compare import Comparison, close, device, draw, dtypes, relative
from pronghorn.diagnostics.live import MEASURE, peak_bytes
from pronghorn.hardware import probe


@dataclass(frozen=True)
class Size:
    """A model and its batch: `documents` rows of `length` tokens."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    documents: int
    length: int


SIZES = {
    "cuda": Size(512, 1408, 4, 8192, 4, 512),
    "cpu": Size(128, 384, 2, 2048, 2, 128),
}


@dataclass
class Outcome:
    """What one step gave and took."""

    loss: float
    gradients: dict[str, Tensor]
    peak: int = 0


def small_model(size: Size, dtype: torch.dtype) -> Any:
    """A random Llama with PEFT's LoRA, A and B non-zero (B = 0 would hide a wrong gradient of A), on the device."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from pronghorn.loading.adapters import DEFAULT_TARGETS

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=max(1, size.hidden // 128),
        vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(
            LlamaForCausalLM(config),
            LoraConfig(r=16, lora_alpha=32, target_modules=list(DEFAULT_TARGETS), task_type="CAUSAL_LM"),
        )
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, 0.5 * parameter.shape[-1] ** -0.5)
    adapted = adapted.to(device=device(), dtype=dtype).train()
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # adapters are trained in fp32, whatever the model computes in
            parameter.data = parameter.data.float()
    return adapted


def stock_step(model: Any, ids: Tensor) -> Outcome:
    """Transformers' forward, autograd's backward, on rows [B, S]."""
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return Outcome(float(loss.detach()), gradients_of(model))


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(ids: Tensor) -> tuple[dict[str, Any], int]:
    """The batch as the trainer's collator makes it, on the device, and its supervised tokens."""
    from pronghorn.data.collator import BOOKKEEPING, Collator

    batch = Collator(pad_token_id=0)(
        [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids.cpu()]
    )
    supervised = batch["supervised"]
    moved = {k: v.to(ids.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return {k: v for k, v in moved.items() if k not in BOOKKEEPING}, supervised


def _ids(size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, size.vocabulary, (size.documents, size.length), generator=generator).to(device())


def _timed(step: Any) -> float:
    began = time.perf_counter()
    step()
    if probe().is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def lora_step() -> str:
    """Loss, every adapter gradient and peak memory of a step, against the stock one in higher precision."""
    from pronghorn.engine import TrainingStep, bind

    size, dtype = SIZES[device().type], dtypes()[0]
    stock = small_model(size, dtype)
    ids = _ids(size)
    batch, supervised = packed(ids)
    truth = stock_step(copy.deepcopy(stock).to(torch.float32 if dtype.itemsize == 2 else torch.float64), ids)
    fast = copy.deepcopy(stock)
    bind(fast, strict=True)
    step = TrainingStep(fast, capture=False)

    def ours() -> None:
        fast.zero_grad(set_to_none=True)
        step.run(batch, supervised)

    fast.zero_grad(set_to_none=True)
    output = step.run(batch, supervised)
    if output is None:
        raise Unsound(f"the step did not take the fast path: {step.reason}")
    mine = Outcome(float(output.loss), gradients_of(fast))
    plain = stock_step(stock, ids)
    worst = judge_step(mine, plain, truth, dtype)
    gc.collect()
    for outcome, run in ((mine, ours), (plain, lambda: stock_step(stock, ids))):
        outcome.peak = peak_bytes(device(), run)
    said = (
        f"{len(mine.gradients)} adapter gradients, {worst}; peak {mine.peak / 2**20:.1f} MiB "
        f"{MEASURE[device().type]}, {plain.peak / 2**20:.1f} MiB with Transformers and PEFT"
    )
    if mine.peak > 1.05 * plain.peak:
        raise Unsound(said, "report this with the output of `pronghorn doctor --json`")
    return said


def judge_step(mine: Outcome, plain: Outcome, truth: Outcome, dtype: torch.dtype) -> str:
    """Our gradients are as near the truth as the stock ones in the same dtype.

    Raises:
        Unsound: naming the first parameter that is not.
    """
    if mine.gradients.keys() != truth.gradients.keys():
        odd = sorted(mine.gradients.keys() ^ truth.gradients.keys())
        raise Unsound(f"{len(odd)} parameters have a gradient on one side only, such as {odd[0]}")
    floor = 2e-2 if dtype.itemsize == 2 else 2e-4
    if not abs(mine.loss - truth.loss) <= floor * abs(truth.loss):
        raise Unsound(f"the loss is {mine.loss:.5f}, and {truth.loss:.5f} in higher precision")
    largest, stock_largest = 0.0, 0.0
    for name, exact in truth.gradients.items():
        error, stock = relative(mine.gradients[name], exact), relative(plain.gradients[name], exact)
        largest, stock_largest = max(largest, error), max(stock_largest, stock)
        if not error <= 1.5 * stock + floor:
            raise Unsound(
                f"the gradient of {name} is off by {error:.1e} of its norm, the stock one by {stock:.1e}",
                "report this with the output of `pronghorn doctor --json`",
            )
    return f"off by at most {largest:.1e} (stock {stock_largest:.1e})"


@contextmanager
def _warnings_of_the_library() -> Iterator[list[str]]:
    """What the library's logger says meanwhile, instead of printing it."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("pronghorn"), Keep()
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def captured_step() -> str:
    """The step replayed as one CUDA graph gives what it gives launched kernel by kernel."""
    from pronghorn.engine import TrainingStep, bind

    if not probe().is_cuda:
        raise NotHere("CUDA graphs need a CUDA GPU")
    size = SIZES["cuda"]
    model = small_model(size, dtypes()[0])
    bind(model, strict=True)
    batch, supervised = packed(_ids(size))
    eager = TrainingStep(model, capture=False)
    wanted = eager.run(batch, supervised)
    gradients = gradients_of(model)
    model.zero_grad(set_to_none=True)
    step = TrainingStep(model)
    refusal = step.why_eager(device())
    if refusal is not None:
        raise NotHere(f"steps run kernel by kernel: {refusal}")
    with _warnings_of_the_library() as said:
        found = step.run(batch, supervised)
    if step.captured != 1 or found is None or wanted is None:
        raise Unsound(f"no graph was made: {'; '.join(said) or step.reason}")
    model.zero_grad(set_to_none=True)
    found = step.run(batch, supervised)
    assert found is not None
    worst = max(relative(g, gradients[name]) for name, g in gradients_of(model).items())
    loss, eager_loss = float(found.loss), float(wanted.loss)
    # Attention's backward adds dq up in whatever order its blocks finish.
    if not worst <= 1e-2 or not abs(loss - eager_loss) <= 1e-3 * abs(eager_loss):
        raise Unsound(
            f"replayed gradients are off by {worst:.1e}; the loss is {loss:.5f}, launched one by one {eager_loss:.5f}",
            "train with cuda_graphs=False, and report this",
        )
    replayed, launched = (
        _timed(lambda: step.run(batch, supervised)),
        _timed(lambda: eager.run(batch, supervised)),
    )
    step.release()
    return (
        f"captured in {step.capture_seconds:.1f} s, {replayed * 1e3:.1f} ms a step ({launched * 1e3:.1f} ms launched "
        f"one by one), gradients off by {worst:.0e}"
    )


def bitsandbytes_four_bit() -> str:
    """A weight quantised by bitsandbytes, dequantised by it and by us, and as a layer."""
    if find_spec("bitsandbytes") is None:
        raise NotHere("bitsandbytes is not installed", "pip install 'bitsandbytes>=0.50' for 4-bit weights")
    import bitsandbytes as bnb

    from pronghorn.kernels import fast_linear_forward
    from pronghorn.weights import keep_four_bit_layout, read_weight

    compared, dtype = Comparison(), dtypes()[0]
    dense = draw(192, 256, dtype=dtype, scale=0.05)
    x = draw(9, 256, dtype=dtype)
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            options = {"compress_statistics": double, "quant_type": kind}
            layer = bnb.nn.Linear4bit(256, 192, bias=False, compute_dtype=dtype, **options)
            layer.weight = bnb.nn.Params4bit(dense.clone().cpu(), requires_grad=False, **options)
            layer = layer.to(device())
            keep_four_bit_layout(layer)
            theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            weight = read_weight(layer)
            assert weight is not None
            # bitsandbytes rounds scales or products once more on the way.
            compared.near(f"{kind}{' double' if double else ''}", weight.dense(dtype), theirs, slack=4.0)
            y = fast_linear_forward(layer, x)
            # Factors are rounded to the computing dtype, so that a sum near zero is off by more than its own rounding.
            close(compared, "x Wᵀ", y, x.double() @ weight.dense(torch.float64).T, dtype)
    return str(compared)


def fp8_products() -> str:
    """Products of e4m3 rows with e4m3 weights by the matrix units, and what quantising costs."""
    from pronghorn.kernels import fp8

    fact = probe().fp8
    if not probe().is_cuda or fact.value is None:
        raise NotHere(fact.reason)
    rowwise = fact.value == "rows"
    x, weight = draw(256, 512, dtype=dtypes()[0]), draw(384, 512, dtype=dtypes()[0], scale=0.05)
    codes, scales = fp8.quantise_weight(weight, rowwise=rowwise)
    rows = fp8.quantise_rows(x) if rowwise else fp8.quantise_tensor(x)
    y = fp8.product(rows, codes, scales, torch.bfloat16)
    exact = (rows[0].double() * rows[1].double()) @ (codes.double() * scales.double()).T
    error, cost = relative(y, exact), relative(exact, x.double() @ weight.double().T)
    # Hopper adds up in 14 bits with fast accumulation, and the result is rounded to bf16.
    if not error <= 0.01:
        raise Unsound(f"the matrix units are off by {error:.1e} of the norm", "train without load_in_fp8")
    if not cost <= 0.06:
        raise Unsound(f"quantising costs {cost:.1%} of the norm, where 4 % is to be expected")
    how = "a scale for each row" if rowwise else "one scale for a matrix"
    return f"{how}: off by {error:.1e} of the norm; rounding to e4m3 costs {cost:.1%}"
