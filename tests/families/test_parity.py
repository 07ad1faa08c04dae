"""Loss, logits and every gradient of the bound model against Transformers + PEFT, for each family.

Weights and activations are fp64, but Transformers computes norms, RoPE angles and the loss in fp32 even then: a
handful of roundings of 2⁻²⁴ = 6e-8 in each of two layers, seen as relative errors up to 8e-7 in gradients. 5e-6
leaves room for ill-conditioned ones and none for a wrong formula (a factor of 1.001 in one gradient fails).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.blocks import LEVELS, head_groups, parks
from pronghorn.engine import bind, binding_of
from tests import tiny
from tests.families.parity import (
    FAMILIES,
    LENGTHS,
    Outcome,
    add_adapter,
    add_second_adapter,
    assert_bf16_not_worse,
    assert_generates_as_stock,
    assert_same,
    assert_switches_are_seen,
    bound_copy,
    packed_batch,
    quantise_4bit,
    relative_error,
    rows_batch,
    run,
)
from tests.tiny import tiny_model

EXACT = 5e-6
#: where Transformers computes a recurrence, whose errors add up, in fp32 as well
RECURRENT = 3e-5


def exact(family: str) -> float:
    return RECURRENT if family in tiny.RECURRENT else EXACT


def stock(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return tiny_model(family, **{**FAMILIES[family], **options}).to(dtype)


def expected_of(model: Any, rows: dict[str, Any]) -> Outcome:
    """Transformers' numbers; Gemma 2's from the stream, because in fp64 its eager attention, which alone caps, gives no
    number to a padding position whose whole window is padding."""
    if model.config.model_type != "gemma2":
        return run(model, rows)
    outcome = run(model, packed_batch(rows))
    outcome.logits = outcome.logits[0]  # type: ignore[index]
    return outcome


#: on a CPU what a level parks stays where it is, which one family shows
CASES = [(family, level) for family in FAMILIES for level in LEVELS if family == "llama" or not parks(level)]


@pytest.mark.parametrize("family,level", CASES)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_rows_match_transformers(family: str, level: str, mode: str) -> None:
    model = stock(family)
    if mode == "lora":
        model = add_adapter(model)
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    fast = bound_copy(model, level)
    assert_same(run(fast, batch), expected_of(model, batch), exact(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_packed_stream_equals_rows(family: str, mode: str) -> None:
    model = stock(family)
    if mode == "lora":
        model = add_adapter(model)
    fast = bound_copy(model, ["none", "all"])
    rows = rows_batch(model.config.vocab_size, LENGTHS)
    expected = expected_of(model, rows)
    actual = run(fast, packed_batch(rows))
    actual.logits = actual.logits[0]  # type: ignore[index]
    assert_same(actual, expected, exact(family))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_position_ids_alone_tell_documents_apart(family: str) -> None:
    """As in Transformers: a position that does not follow the one before begins a document."""
    model = add_adapter(stock_on_stream(stock(family)))
    packed = packed_batch(rows_batch(model.config.vocab_size, LENGTHS))
    batch = {name: packed[name] for name in ("input_ids", "labels", "position_ids")}
    fast = bound_copy(model, "none")
    assert_same(run(fast, batch), run(model, batch), EXACT)
    assert_same(run(fast, batch), run(fast, packed), EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["lm_head", "gate_proj"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_adapter_options(options: dict[str, Any]) -> None:
    # qwen2 has biases on q, k and v, so that bias="all" trains something.
    model = add_adapter(stock("qwen2", tie_word_embeddings=False), **options)
    batch = packed_batch(rows_batch(model.config.vocab_size, LENGTHS))
    fast = bound_copy(model, ["matmuls", "none"])
    assert_same(run(fast, batch), run(stock_on_stream(model), batch), EXACT)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_bias": True}, {"r": 64}], ids=lambda o: "-".join(o)
)
def test_adapter_options_where_one_module_gives_several(options: dict[str, Any]) -> None:
    model = add_adapter(stock("phi3"), **options)
    rows = rows_batch(model.config.vocab_size, LENGTHS)
    assert_same(run(bound_copy(model, ["matmuls", "none"]), rows), run(model, rows), EXACT)


@pytest.mark.parametrize("lengths", [(13, 7, 13, 1), (12, 7)], ids=["long", "short"])
def test_longrope_goes_by_the_longest_document(lengths: tuple[int, ...]) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 12,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
        "long_factor": [1.0, 2.0, 4.0, 7.0, 11.0, 16.0],
    }
    options = {"original_max_position_embeddings": 12, "rope_parameters": rope}
    model = add_adapter(tiny_model("phi3", **options).double())
    rows = rows_batch(model.config.vocab_size, lengths)
    expected = run(model, rows)
    fast = bound_copy(model, "none")
    assert_same(run(fast, rows), expected, EXACT)
    packed = run(fast, packed_batch(rows))
    packed.logits = packed.logits[0]  # type: ignore[index]
    assert_same(packed, expected, EXACT)


def test_padding_on_the_left_is_padding_on_the_right() -> None:
    """Also where a row's first token has a label, which Transformers would predict from a padding position."""
    model = add_adapter(stock("mistral"))
    fast = bound_copy(model, "none")
    right = rows_batch(model.config.vocab_size, LENGTHS)
    mask = right["attention_mask"].bool()
    left = {name: torch.zeros_like(rows) for name, rows in right.items()}
    left["attention_mask"] = right["attention_mask"].flip(1)
    for name, filler in (("input_ids", 0), ("labels", -100)):
        left[name] = torch.full_like(right[name], filler)
        left[name][left["attention_mask"].bool()] = right[name][mask]
    expected = run(model, right)
    assert_same(run(fast, left), expected, EXACT)
    first = left["attention_mask"].diff(dim=1, prepend=torch.zeros(len(LENGTHS), 1).long()) == 1
    left["labels"][first] = left["input_ids"][first]
    assert_same(run(fast, left), expected, EXACT)


def stock_on_stream(model: Any) -> Any:
    """Transformers' eager attention with the block-diagonal mask that it derives from position_ids."""
    model.config._attn_implementation = "sdpa"
    return model


def test_two_active_adapters() -> None:
    model = add_adapter(stock("llama"))
    add_second_adapter(model, target_modules=["q_proj", "up_proj"])
    batch = rows_batch(model.config.vocab_size, (9, 9))
    assert_same(run(bound_copy(model, "none"), batch), run(model, batch), EXACT)


def test_switched_off_and_merged_adapters_are_seen() -> None:
    assert_switches_are_seen(add_adapter(stock("llama")), EXACT)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_four_bit(family: str, double_quant: bool) -> None:
    """Against PEFT on the same codes: fp32 on both sides, dequantised values identical."""
    pytest.importorskip("bitsandbytes")
    model = add_adapter(quantise_4bit(stock(family, torch.float32), double_quant))
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    fast = bound_copy(model, "none")
    expected, actual = run(model, batch, logits=False), run(fast, batch, logits=False)
    # fp32: 2⁻²⁴ per operation over sums of some hundred terms, through two layers.
    assert_same(actual, expected, 2e-5 + exact(family))


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "cohere"]
)
def test_bf16_is_not_worse_than_transformers(family: str) -> None:
    """Over six draws the ratio was 0.6 to 0.94."""
    assert_bf16_not_worse(lambda seed: add_adapter(stock(family, torch.float32), seed=seed), seeds=6)


def test_loss_is_the_same_for_any_grouping() -> None:
    """Micro-batches of different sizes, each normalised by the global count, add up to the whole batch."""
    model = add_adapter(stock("qwen3"))
    fast = bound_copy(model, "attention")
    rows = rows_batch(model.config.vocab_size, (11, 4, 8, 6))
    supervised = int((rows["labels"][:, 1:] != -100).sum())
    whole = run(fast, {**packed_batch(rows), "num_items_in_batch": supervised}, logits=False)
    fast.zero_grad(set_to_none=True)
    for part in (slice(0, 1), slice(1, 4)):
        piece = packed_batch({key: value[part] for key, value in rows.items()})
        fast(**piece, num_items_in_batch=supervised, use_cache=False).loss.backward()
    for name, parameter in fast.named_parameters():
        if parameter.grad is not None:
            assert relative_error(parameter.grad, whole.gradients[name]) < EXACT, name


def test_a_mutated_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison must be able to fail: a sign error in the activation's gradient is found."""
    import pronghorn.blocks.glu as glu

    correct = glu.glu_backward

    def mutated(*args: Any, **kwargs: Any) -> Any:
        act, dgate, dup = correct(*args, **kwargs)
        return act, dgate * 1.001, dup

    model = add_adapter(stock("llama"))
    batch = rows_batch(model.config.vocab_size, LENGTHS)
    expected = run(model, batch)
    monkeypatch.setattr(glu, "glu_backward", mutated)
    with pytest.raises(AssertionError, match="gate_proj"):
        assert_same(run(bound_copy(model), batch), expected, EXACT)


def test_dropout_matches_peft_under_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapter dropout: PEFT with our masks put into its dropout modules gives the same gradients."""
    from pronghorn.kernels.dropout import seeded_dropout

    model = add_adapter(stock("llama"), lora_dropout=0.3)
    fast = bound_copy(model, "none")
    monkeypatch.setattr("pronghorn.engine.forward.dropout_seed", lambda training: 77 if training else 0)
    slots = {"q": 0, "k": 1, "v": 2, "o": 3, "gate": 4, "up": 5, "down": 6}

    class SameMask(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.seed = seed

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1])
            mask = seeded_dropout(torch.ones_like(flat), 0.3, self.seed)
            return (flat * mask).view_as(x)

    for index, layer in enumerate(model.base_model.model.model.layers):
        for parent in (layer.self_attn, layer.mlp):
            for name, module in parent.named_children():
                if hasattr(module, "lora_dropout"):
                    slot = slots[name.removesuffix("_proj")]
                    module.lora_dropout["default"] = SameMask(77 + 128 * index + 8 * slot)
    batch = rows_batch(model.config.vocab_size, (9, 9))
    batch.pop("attention_mask")
    assert_same(run(fast, batch, logits=False), run(model, batch, logits=False), EXACT)
    without = bound_copy(add_adapter(stock("llama")), "none")
    assert relative_error(run(without, batch).loss, run(fast, batch).loss) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_stock(family: str) -> None:
    assert_generates_as_stock(stock(family, torch.float32))


def test_undo_restores_the_stock_model() -> None:
    model = stock("llama")
    fast = bound_copy(model)
    binding = binding_of(fast)
    assert binding is not None and "forward" in fast.__dict__
    binding.undo()
    assert binding_of(fast) is None
    assert all("forward" not in m.__dict__ for m in fast.modules())
    assert fast.state_dict().keys() == model.state_dict().keys()


def test_binding_twice_changes_nothing() -> None:
    fast = bound_copy(stock("llama"))
    assert bind(fast) is binding_of(fast)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("level", ["none", "attention", "all"])
def test_attention_by_groups_of_heads(family: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a long row: gradients lie where dout, k and v did, which may be kept ones."""
    monkeypatch.setattr(head_groups, "GROUP_TOKENS", 16)
    model = add_adapter(tiny_model(family, dtype=torch.float64))
    rows = rows_batch(model.config.vocab_size, LENGTHS)
    assert head_groups.head_groups(sum(LENGTHS), model.config.num_key_value_heads, "eager") > 1
    fast = bound_copy(model, level)
    binding_of(fast).choose_attention("eager")  # type: ignore[union-attr]
    assert_same(run(fast, rows, logits=False), run(model, rows, logits=False), EXACT)
