"""Numerical parity with stock Transformers and PEFT, before any speed is claimed. Exit status 1 when red.

    python -m benchmarks.verify

Truth is the stock model in fp32 on the same (rounded or quantised) weights, row by row with padding. In bf16 and NF4
pronghorn's error against it may be at most 1.2 times the stock bf16 model's own error: for all adapter gradients
together, and for each of them, where a gradient that stock Transformers happens to hit closely is held to the median
error of its kind. In fp32 both differ by the order of sums only, and the bound is absolute.

Rounding errors of one model and batch are one draw: where gradients cancel (gates, mixtures, linear attention) their
ratio is 0.3 to 1.7 by chance. A case in 16 bits that one draw finds red is drawn again, with other weights and tokens,
and judged by the root mean square of the errors of all draws, stock's and pronghorn's alike; a real loss of precision
is in every draw.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.parity import DEFAULT_FILE, record
from benchmarks.registry import LEVELS
from benchmarks.table import plain_table

ALLOWED_RATIO = 1.2
#: draws that a case is judged by where the first alone is red
DRAWS = 6
#: fp32: sums of up to a few thousand terms in another order, through a handful of layers: some hundred ulp of 6e-8
FP32_BOUND = 5e-5
#: the loss is one number, whose error can cancel by chance on either side: it is held to one bf16 rounding instead
LOSS_BOUND = {"fp32": 1e-5, "bf16": 2**-8, "nf4": 2**-8}

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512},
    "mid": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 32000},
}  # fmt: skip
#: the linear modules of all families' layers; those that a model has are adapted
TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "in_proj_qkv",
    "in_proj_z",
    "in_proj_b",
    "in_proj_a",
    "in_proj_qkvz",
    "in_proj_ba",
    "out_proj",
)
LENGTHS = {"tiny": (37, 5, 64, 1, 20), "mid": (700, 33, 512, 64, 129)}
WINDOWS = {"tiny": 9, "mid": 200}

FAMILIES = (
    "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3",
    "granite", "smollm3", "cohere", "cohere2", "glm4", "qwen3_moe", "qwen3_5_text", "qwen3_next",
)  # fmt: skip
#: adapted beside the linear modules, by family
STACKS = {name: ["experts.gate_up_proj", "experts.down_proj"] for name in ("qwen3_moe", "qwen3_next")}


@dataclass(frozen=True)
class Case:
    """One model and precision ("fp32", "bf16" or "nf4"); every save level is run on it."""

    family: str
    size: str
    precision: str


@dataclass
class Outcome:
    """Loss and adapter gradients of one forward and backward, in fp32 on the host."""

    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Draw:
    """What each side gives for one model and batch."""

    ours: Outcome
    stock: Outcome
    truth: Outcome


@dataclass(frozen=True)
class Verdict:
    """One case at one level: errors against truth, ours and the stock model's, over so many draws."""

    case: Case
    level: str
    draws: int
    loss_error: float
    error: float
    stock_error: float
    worst: str
    worst_ratio: float
    failures: tuple[str, ...]


def family_config(family: str, size: str) -> Any:
    """A config with what makes the family different switched on."""
    from transformers import AutoConfig

    sizes = dict(SIZES[size])
    if family in ("qwen2", "cohere2"):
        del sizes["head_dim"]  # they have none: hidden_size / num_attention_heads
    settings = {"max_position_embeddings": 2048, "tie_word_embeddings": False, "pad_token_id": 0}
    differences = _differences(family, WINDOWS[size], sizes["num_hidden_layers"], SIZES[size]["head_dim"])
    return AutoConfig.for_model(family, **sizes, **settings, **differences)


def _differences(family: str, window: int, layers: int, head: int) -> dict[str, Any]:
    """What a family's config has besides sizes."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    by_layer = {
        "sliding_window": window,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
    }
    llama3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 32}  # fmt: skip
    # Every token takes all experts: which ones are chosen is no continuous function, and 16 bits choose others.
    mixture = {
        "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 48, "norm_topk_prob": True,
    }  # fmt: skip
    hybrid = {
        "layer_types": ["linear_attention", "full_attention"] * (layers // 2),
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": head, "linear_value_head_dim": head,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }  # fmt: skip
    return {
        "llama": {"rope_parameters": llama3},
        "mistral": {"sliding_window": window},
        "ministral": by_layer,
        "ministral3": {"sliding_window": window, "rope_parameters": yarn},
        "qwen2": {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1},
        "gemma2": {**by_layer, **caps, "query_pre_attn_scalar": 24},
        "gemma3_text": {**by_layer, "query_pre_attn_scalar": 24},
        "smollm3": {**by_layer, "use_sliding_window": True, "no_rope_layers": [1, 0] * (layers // 2)},
        "cohere": {"logit_scale": 0.5},
        "cohere2": {**by_layer, "logit_scale": 0.3},
        "phi3": {"sliding_window": window, "partial_rotary_factor": 0.75},
        "qwen3_moe": mixture,
        "qwen3_5_text": hybrid,
        # 64: bitsandbytes' CPU code misreads rows that are shorter than its blocks of 64.
        "qwen3_next": {**hybrid, **mixture, "shared_expert_intermediate_size": 64},
        "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1,
                    "logits_scaling": 2.0},
    }.get(family, {})  # fmt: skip


def build_model(case: Case, device: str, draw: int = 0) -> Any:
    """The stock model with LoRA on every linear layer, weights rounded to the case's storage."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            family_config(case.family, case.size),
            dtype=dtype,
            # Transformers caps logits in its eager attention only.
            attn_implementation="eager" if case.family == "gemma2" else "sdpa",
        )
    generator = torch.Generator(device).manual_seed(1 + draw)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
                if _has_offset(case.family, name):  # multiplies by 1 + w
                    parameter.sub_(1.0)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
            else:
                parameter.normal_(0.0, 0.6 * parameter.shape[-1] ** -0.5, generator=generator)
        # Embeddings of unit size: the residual stream starts at the scale real models have. Gemma's scale themselves.
        embeddings = model.get_input_embeddings()
        embeddings.weight.normal_(
            0.0, 1.0 / getattr(embeddings, "scalar_embed_scale", 1.0), generator=generator
        )
    if case.precision == "nf4":
        quantise_4bit(model)
    options = {"r": 8, "lora_alpha": 16, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    if case.family in STACKS:
        options["target_parameters"] = STACKS[case.family]
    adapted = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:  # B as well: B = 0 would hide a wrong gradient of A
                parameter.normal_(0.0, 0.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return adapted.train()


def _has_offset(family: str, norm: str) -> bool:
    if family in ("qwen3_5_text", "qwen3_next"):
        return "linear_attn" not in norm
    return family.startswith("gemma")


def _linears(model: Any) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        attentions = (getattr(layer, name, None) for name in ("self_attn", "linear_attn"))
        shared = getattr(layer.mlp, "shared_expert", None)
        for parent in filter(None, (*attentions, layer.mlp, shared)):
            for name, child in list(parent.named_children()):
                if name in TARGETS:
                    yield parent, name, child


def quantise_4bit(model: Any) -> None:
    """Every linear layer of the decoder in NF4 with double quantisation, in place."""
    import bitsandbytes as bnb

    options = {"compress_statistics": True, "quant_type": "nf4"}
    for parent, name, linear in _linears(model):
        biased = linear.bias is not None
        packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, biased, torch.bfloat16, **options)
        packed.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, **options)
        packed.bias = linear.bias
        setattr(parent, name, packed.to(linear.weight.device))


def truth_of(model: Any, case: Case) -> Any:
    """The stock model in fp32 on the weights that the case stores."""
    if case.precision != "nf4":
        return copy.deepcopy(model).float()
    from bitsandbytes.functional import dequantize_4bit

    truth = copy.deepcopy(model)
    for parent, name, layer in _linears(truth):
        packed = getattr(layer, "base_layer", layer)
        dense = dequantize_4bit(packed.weight.data, packed.weight.quant_state).float()
        plain = nn.Linear(
            packed.in_features, packed.out_features, packed.bias is not None, device=dense.device
        )
        plain.weight = nn.Parameter(dense.reshape(plain.weight.shape), requires_grad=False)
        plain.bias = packed.bias
        if packed is layer:  # PEFT lets gate and up of a shared expert be where the experts' are adapted
            setattr(parent, name, plain)
        else:
            layer.base_layer = plain
    # PEFT's 4-bit layer runs any base layer's forward, then adds A and B: with a plain base it is plain LoRA.
    return truth.float()


def padded_batch(case: Case, device: str, draw: int = 0) -> dict[str, Tensor]:
    """Right-padded rows; a quarter of the tokens unsupervised."""
    generator = torch.Generator().manual_seed(3 + draw)
    lengths = torch.tensor(LENGTHS[case.size])
    shape = (len(lengths), int(lengths.max()))
    input_ids = torch.randint(0, SIZES[case.size]["vocab_size"], shape, generator=generator)
    mask = torch.arange(shape[1])[None] < lengths[:, None]
    labels = input_ids.masked_fill((torch.rand(shape, generator=generator) < 0.25) | ~mask, -100)
    labels[:, 0] = -100
    batch = {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def packed_batch(rows: dict[str, Tensor]) -> dict[str, Any]:
    """The same documents as one stream, as the trainer's collator makes it."""
    mask = rows["attention_mask"].bool()
    lengths = mask.sum(1)
    ends = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return {
        "input_ids": rows["input_ids"][mask][None],
        "labels": rows["labels"][mask][None],
        "position_ids": torch.cat([torch.arange(int(n), device=mask.device) for n in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def step(model: Any, batch: dict[str, Any], autocast: bool) -> Outcome:
    """One forward and backward; under bf16 autocast where the base is bf16, as trainers do."""
    model.zero_grad(set_to_none=True)
    device = batch["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad.detach().float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(float(loss.detach()), gradients)


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; NaN counts as infinite."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def root_mean_square(values: Sequence[float]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5


def whole(outcome: Outcome, names: list[str]) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([outcome.gradients[name].flatten() for name in names])


def kind_of(name: str) -> str:
    """A gradient's kind: projection and matrix, without the layer's number."""
    return ".".join(part for part in name.split(".") if "_proj" in part or part.startswith("lora_"))


def judge(case: Case, level: str, draws: Sequence[Draw]) -> Verdict:
    """Hold what one level gave to the rule in the module's description."""
    names = list(draws[0].truth.gradients)
    failures = []
    odd = sorted({name for draw in draws for name in set(names) ^ set(draw.ours.gradients)})
    if odd:
        failures.append(f"{len(odd)} parameters have a gradient on one side only, first {odd[0]}")
        names = [name for name in names if name not in odd]

    def errors(of: Callable[[Draw], Outcome], pick: Callable[[Outcome], Tensor]) -> float:
        return root_mean_square([relative(pick(of(draw)), pick(draw.truth)) for draw in draws])

    def ours(draw: Draw) -> Outcome:
        return draw.ours

    def stock(draw: Draw) -> Outcome:
        return draw.stock

    stock_errors = {name: errors(stock, lambda o, n=name: o.gradients[n]) for name in names}
    kinds: dict[str, list[float]] = {}
    for name, error in stock_errors.items():
        kinds.setdefault(kind_of(name), []).append(error)
    exact = case.precision == "fp32"
    ratios = {}
    for name in names:
        allowed = FP32_BOUND if exact else max(stock_errors[name], median(kinds[kind_of(name)]))
        ratios[name] = errors(ours, lambda o, n=name: o.gradients[n]) / max(allowed, 1e-30)
    worst = max(ratios, key=lambda name: ratios[name])
    bar = 1.0 if exact else ALLOWED_RATIO
    failures += [f"{name}: {ratio:.2f}x" for name, ratio in ratios.items() if not ratio <= bar]
    error, stock_error = (errors(of, lambda o: whole(o, names)) for of in (ours, stock))
    if not error <= (FP32_BOUND if exact else ALLOWED_RATIO * stock_error):
        failures.append(f"all gradients: {error:.2e}, stock {stock_error:.2e}")
    loss_errors = [abs(draw.ours.loss - draw.truth.loss) / abs(draw.truth.loss) for draw in draws]
    for draw, loss_error in zip(draws, loss_errors, strict=True):
        if not loss_error <= LOSS_BOUND[case.precision]:
            failures.append(f"loss {draw.ours.loss} instead of {draw.truth.loss}")
    return Verdict(
        case, level, len(draws), max(loss_errors), error, stock_error, worst, ratios[worst], tuple(failures)
    )


def check(case: Case, device: str, levels: tuple[str, ...] = LEVELS) -> list[Verdict]:
    """Run one case at every level; where one draw is red, judge that level by `DRAWS` of them."""
    drawn = [draw_levels(case, device, levels, 0)]
    verdicts = {level: judge(case, level, [drawn[0][level]]) for level in levels}
    red = tuple(level for level, verdict in verdicts.items() if verdict.failures)
    if red and case.precision != "fp32":
        drawn += [draw_levels(case, device, red, number) for number in range(1, DRAWS)]
        verdicts |= {level: judge(case, level, [draw[level] for draw in drawn]) for level in red}
    return list(verdicts.values())


def draw_levels(case: Case, device: str, levels: tuple[str, ...], number: int) -> dict[str, Draw]:
    """One model and batch at the given levels."""
    from pronghorn.engine import bind

    model = build_model(case, device, number)
    rows = padded_batch(case, device, number)
    autocast = case.precision != "fp32"
    truth = step(truth_of(model, case), rows, autocast=False)
    stock = step(model, rows, autocast)
    model.zero_grad(set_to_none=True)
    binding = bind(model, strict=True)
    packed = packed_batch(rows)
    found = {}
    for level in levels:
        binding.set_save_levels(level)
        found[level] = Draw(step(model, packed, autocast), stock, truth)
    return found


def cases(families: tuple[str, ...], sizes: tuple[str, ...], precisions: tuple[str, ...]) -> list[Case]:
    """All combinations that can run here."""
    if find_spec("bitsandbytes") is None:
        precisions = tuple(p for p in precisions if p != "nf4")
    return [Case(f, s, p) for s in sizes for f in families for p in precisions]


def row(verdict: Verdict) -> list[str]:
    """One table row."""
    case = verdict.case
    state = "ok" if not verdict.failures else "FAILED"
    return [
        f"{case.family} {case.size} {case.precision}", verdict.level, str(verdict.draws), f"{verdict.loss_error:.1e}",
        f"{verdict.error:.2e}", f"{verdict.stock_error:.2e}", f"{verdict.worst_ratio:.2f}", state,
    ]  # fmt: skip


HEADER = ("case", "saves", "draws", "loss error", "gradients", "stock's", "worst ratio", "state")


def main(argv: list[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify", description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--sizes", default="tiny,mid" if on_gpu else "tiny")
    parser.add_argument("--precisions", default="fp32,bf16,nf4")
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument(
        "--record",
        type=Path,
        default=DEFAULT_FILE,
        help="JSON file that `benchmarks.run` reads the outcome from",
    )
    options = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    split = {
        name: tuple(getattr(options, name).split(","))
        for name in ("families", "sizes", "precisions", "levels")
    }
    lines, failures = [], []
    outcome: dict[str, bool] = {}
    for case in cases(split["families"], split["sizes"], split["precisions"]):
        try:
            verdicts = check(case, options.device, split["levels"])
        except Exception as error:  # the other cases still run, and this one counts as failed
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            failures.append(f"{case.family} {case.size} {case.precision}: {reason}")
            outcome |= {
                f"{case.family} {case.size} {case.precision} {level}": False for level in split["levels"]
            }
            continue
        lines += [row(verdict) for verdict in verdicts]
        for verdict in verdicts:
            outcome[f"{row(verdict)[0]} {verdict.level}"] = not verdict.failures
            failures += [f"{row(verdict)[0]}, {verdict.level}: {text}" for text in verdict.failures[:3]]
    if lines:
        print(plain_table(HEADER, lines))
    print("\n".join(failures) or f"parity holds: {len(lines)} combinations", flush=True)
    if outcome:
        record("exact", outcome, options.record, "CPU" if options.device == "cpu" else None)
    if options.out:
        with options.out.open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *lines])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
