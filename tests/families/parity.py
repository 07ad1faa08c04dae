"""Shared by the family tests: a stock model and its bound copy, one batch, every number compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from pronghorn.blocks.levels import DEPTHS
from pronghorn.data.budgets import Budgets
from pronghorn.data.collator import BOOKKEEPING, Collator
from pronghorn.engine import TrainingStep, bind, binding_of

#: tokens of a batch's rows
LENGTHS = (13, 7, 13, 1)
#: name -> configuration beyond tests.tiny's: what makes each family different is switched on
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"sliding_window": 5},
    "ministral": {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    "ministral3": {
        "sliding_window": 9,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 6,
            "llama_4_scaling_beta": 0.3,
        },
    },
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {
        # Some versions of Transformers choose another, which leaves the cap out.
        "attn_implementation": "eager",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
        # Caps low enough to bend most of these models' logits.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 7,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 24,
    },
    "phi3": {"sliding_window": 5, "partial_rotary_factor": 0.75},
    "smollm3": {
        "no_rope_layers": [1, 0],
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "youtu": {"tie_word_embeddings": True},
    "minicpm3": {"scale_emb": 3.0, "scale_depth": 0.9, "dim_model_base": 40},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.7, "attention_bias": True},
    "cohere2": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "logit_scale": 1.3,
        "tie_word_embeddings": True,
    },
    "glm": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "ernie4_5": {"use_bias": True},
    "helium": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_5_text": {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.7,
        "attention_bias": True,
        "mlp_bias": True,
    },
}

TARGETS = [
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj",
]  # fmt: skip


def add_adapter(model: Any, seed: int = 1, **options: Any) -> Any:
    """A PEFT LoRA with every tensor non-zero: B = 0 would hide a wrong gradient of A."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
    )
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
                parameter.copy_(noise + (1.0 if "magnitude" in name else 0.0) * parameter.cpu().double())
    return peft_model


def quantise_4bit(model: Any, double_quant: bool) -> Any:
    """Every linear layer of the decoder in NF4 by bitsandbytes, in place."""
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for parent in (getattr(layer, "self_attn", None) or layer.linear_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                options = {"compress_statistics": double_quant, "quant_type": "nf4"}
                packed = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    linear.bias is not None,
                    linear.weight.dtype,
                    **options,
                )
                packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **options)
                packed.bias = linear.bias
                setattr(parent, name, packed.to(linear.weight.device))
    return model


@dataclass
class Outcome:
    """Loss, logits and every gradient of one forward and backward."""

    loss: Tensor
    logits: Tensor | None
    gradients: dict[str, Tensor]


def run(model: Any, batch: dict[str, Any], *, logits: bool = True) -> Outcome:
    """One training-mode step without an optimizer; logits from a second call without labels."""
    model.train()
    model.zero_grad(set_to_none=True)
    output = model(**batch, use_cache=False)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    without_labels = {
        k: v for k, v in batch.items() if k not in ("labels", "loss_rows", "num_items_in_batch")
    }
    seen = model(**without_labels, use_cache=False).logits.detach() if logits else None
    if seen is not None and "attention_mask" in batch:
        seen = seen[batch["attention_mask"].bool()]
    return Outcome(output.loss.detach(), seen, gradients)


def rows_batch(vocabulary: int, lengths: tuple[int, ...], seed: int = 3) -> dict[str, Tensor]:
    """Right-padded rows [B, S] with an attention mask; a third of the labels unsupervised."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.randint(0, vocabulary, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    dropped = torch.rand(input_ids.shape, generator=generator) < 0.33
    labels = input_ids.masked_fill(dropped | ~mask, -100)
    labels[:, 0] = -100
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}


def packed_batch(rows: dict[str, Tensor]) -> dict[str, Any]:
    """The same rows as one stream without padding, as the trainer's collator makes it."""
    mask = rows["attention_mask"].bool()
    lengths = mask.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return {
        "input_ids": rows["input_ids"][mask][None],
        "labels": rows["labels"][mask][None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }


def bound_copy(model: Any, level: str | list[str] = "all") -> Any:
    """A deep copy with the fast path on it."""
    fast = copy.deepcopy(model)
    binding = bind(fast, strict=True)
    binding.set_save_levels(level)
    return fast


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in fp64."""
    scale = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / max(scale, 1e-30)


def assert_same(actual: Outcome, expected: Outcome, tolerance: float) -> None:
    """Loss, logits and all gradients within `tolerance`; names the tensor that failed."""
    errors = {"loss": relative_error(actual.loss, expected.loss)}
    if actual.logits is not None and expected.logits is not None:
        errors["logits"] = relative_error(actual.logits, expected.logits)
    assert actual.gradients.keys() == expected.gradients.keys(), "different parameters received gradients"
    for name, gradient in expected.gradients.items():
        errors[name] = relative_error(actual.gradients[name], gradient)
    failed = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not failed, f"beyond {tolerance}: {failed}"


def assert_same_at_every_level(model: Any, tolerance: float) -> None:
    """Rows through a bound copy at every save level, against the stock model."""
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    expected, fast = run(model, batch), bound_copy(model)
    for level in DEPTHS:  # without a GPU the others keep the same
        binding_of(fast).set_save_levels(level)  # type: ignore[union-attr]
        assert_same(run(fast, batch), expected, tolerance)


def assert_stream_equals_rows(model: Any, level: str, tolerance: float) -> None:
    """One packed stream through a bound copy, against the stock model's rows."""
    rows = rows_batch(model.config.vocab_size, LENGTHS)
    actual = run(bound_copy(model, level), packed_batch(rows))
    actual.logits = actual.logits[0]  # type: ignore[index]
    assert_same(actual, run(model, rows), tolerance)


def assert_generates_as_stock(model: Any) -> None:
    """Greedy tokens of a bound copy are the stock model's."""
    fast = bound_copy(model.eval())
    prompt = torch.arange(5)[None]
    with torch.no_grad():
        expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
        assert torch.equal(fast.generate(prompt, max_new_tokens=6, do_sample=False), expected)


def add_second_adapter(model: Any, **options: Any) -> None:
    """Another LoRA beside the first, both active, non-zero as well."""
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, **options))
    model.base_model.set_adapter(["default", "second"])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "second" in name:
                parameter.normal_(std=0.2, generator=generator)


def assert_switches_are_seen(model: Any, tolerance: float) -> None:
    """A bound model follows its adapter switched off, merged and taken out again."""
    fast = bound_copy(model)
    inputs = {"input_ids": torch.arange(24).view(2, 12), "use_cache": False}
    with torch.no_grad():
        adapted = fast(**inputs).logits
        with fast.disable_adapter(), model.disable_adapter():
            plain = fast(**inputs).logits
            assert relative_error(plain, model(**inputs).logits) < tolerance
        fast.merge_adapter()
        assert relative_error(fast(**inputs).logits, adapted) < tolerance
        fast.unmerge_adapter()
        assert relative_error(fast(**inputs).logits, adapted) < tolerance
    assert relative_error(plain, adapted) > 1e-2


def assert_bf16_not_worse(make: Callable[[int], Any], seeds: int) -> None:
    """Our bf16 gradient errors against fp32 are at most 1.2 times those of Transformers in bf16.

    By root mean squares over models and batches of several seeds: in one draw single tensors vary by a factor of 2
    either way.
    """
    ours, theirs = [], []
    for seed in range(seeds):
        truth = make(seed)
        batch = rows_batch(truth.config.vocab_size, LENGTHS, seed=seed)
        expected = run(truth, batch, logits=False).gradients
        low = copy.deepcopy(truth).to(torch.bfloat16)
        reference = run(low, batch, logits=False).gradients
        actual = run(bound_copy(low, "matmuls"), batch, logits=False).gradients
        ours.append([relative_error(actual[name], g) for name, g in expected.items()])
        theirs.append([relative_error(reference[name], g) for name, g in expected.items()])
    ratio = (torch.tensor(ours).pow(2).mean() / torch.tensor(theirs).pow(2).mean()).sqrt().item()
    assert ratio <= 1.2, f"our bf16 errors are {ratio:.2f} times those of Transformers"


def run_step(step: TrainingStep, model: Any, rows: dict[str, Tensor]) -> Outcome:
    """Rows through a step of static shape, with the filling tokens of the collator that nobody learns from."""
    mask = rows["attention_mask"].bool()
    data = [
        {"input_ids": ids[kept].tolist(), "labels": labels[kept].tolist()}
        for ids, labels, kept in zip(rows["input_ids"], rows["labels"], mask, strict=True)
    ]
    batch = Collator(pad_token_id=0, budgets=Budgets())(data)
    output = step.run({k: v for k, v in batch.items() if k not in BOOKKEEPING}, batch["supervised"])
    assert output is not None
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(output.loss, None, gradients)
