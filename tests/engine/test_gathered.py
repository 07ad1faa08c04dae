"""Weights in common buffers: what a model computes and what is saved of it stay the same to the bit."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from pronghorn.data.budgets import Budgets
from pronghorn.engine import TrainingStep, bind, binding_of, gathered
from pronghorn.engine.gathered import gather_for, gathering_of, released, staying
from pronghorn.engine.planning import shape_of
from pronghorn.errors import BudgetTooSmall
from pronghorn.export import save_gguf, save_merged
from pronghorn.memory import Batch, estimate, plan, rates_of, with_margin
from pronghorn.memory.allocator import MIB, Allocator
from pronghorn.memory.plan import leanest
from pronghorn.weights import gather, keep_in_place, side_by_side, stacked
from tests.engine.test_step import DEVICE, ON_GPU, adapted, collated, gpu_only, gradients, rows
from tests.families.parity import TARGETS, add_adapter, quantise_4bit
from tests.tiny import tiny_model, tiny_tokenizer

GIB = 2**30
BATCH = Batch(4096, 4096, 4)


def gather_all(model: Any) -> Any:
    """Move all that can be moved, which here is all."""
    gathering = gathering_of(binding_of(model))
    moved = [tensor for block in (*gathering.blocks, *gathering.aside) for tensor in block.tensors]
    assert {id(p) for p in model.parameters()} <= {id(tensor) for tensor in moved}
    gather(gathering.blocks, gathering.aside)
    return model


def model_of(family: str, **sizes: Any) -> Any:
    model = add_adapter(tiny_model(family, **sizes))
    bind(model, strict=True)
    return model


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_step_gives_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pronghorn.engine.joined.joins", lambda device: True)
    apart, model = adapted(family), gather_all(adapted(family))
    batch, supervised = collated(rows(), Budgets())
    expected, output = TrainingStep(apart).run(batch, supervised), TrainingStep(model).run(batch, supervised)
    assert torch.equal(output.loss, expected.loss)
    found = gradients(model)
    assert all(torch.equal(found[name], grad) for name, grad in gradients(apart).items())
    layer = model.get_base_model().model.layers[1]
    for kind in ("weight", "bias"):
        parts = [
            getattr(getattr(layer.self_attn, name).base_layer, kind)
            for name in ("q_proj", "k_proj", "v_proj")
        ]
        assert parts[0] is None or side_by_side(parts, 0) is not None


@pytest.mark.parametrize("copies", [1, 2])
def test_int8_models_give_the_same_bits(copies: int) -> None:
    apart, model = adapted("llama", copies), adapted("llama", copies)
    gather(gathering_of(binding_of(model)).blocks)
    batch, supervised = collated(rows(), Budgets())
    expected, output = TrainingStep(apart).run(batch, supervised), TrainingStep(model).run(batch, supervised)
    assert torch.equal(output.loss, expected.loss)
    found = gradients(model)
    assert all(torch.equal(found[name], grad) for name, grad in gradients(apart).items())
    weights = [binding_of(one).all_groups()[0, 0] for one in (apart, model)]
    before, after = (stacked([p.weight for p in group]) is not None for group in weights)
    assert before == after, "moving keeps groups side by side"
    assert before or ON_GPU, "a tiny model that goes to a GPU goes there tensor by tensor"


def test_a_recorded_step_is_noticed_to_have_moved() -> None:
    model = adapted("llama")
    step = TrainingStep(model)
    step.run(*collated(rows()))
    assert step._unchanged()
    gather(gathering_of(binding_of(model)).blocks)
    assert not step._unchanged()


def test_what_is_saved_is_the_same_to_the_byte(tmp_path: Path) -> None:
    """By Transformers and safetensors, by PEFT's merging, by this library's exports."""
    for name, gathers in (("apart", False), ("gathered", True)):
        model = model_of("qwen2", tie_word_embeddings=True)
        keys = list(model.state_dict())
        if gathers:
            gather_all(model)
        assert list(model.state_dict()) == keys
        base, folder = model.get_base_model(), tmp_path / name
        head, embedding = base.lm_head.weight, base.model.embed_tokens.weight
        assert head is embedding
        save_merged(model, tiny_tokenizer(), folder / "merged", verify=False)
        save_gguf(model, tiny_tokenizer(), folder / "gguf", "f16", verify=False)
        model.save_pretrained(folder / "adapter")
        merged = copy.deepcopy(model).merge_and_unload()
        merged.save_pretrained(folder / "peft")
        model.unload().save_pretrained(folder / "base")
        save_file(
            {k: v for k, v in base.state_dict().items() if k != "lm_head.weight"}, folder / "file.safetensors"
        )
        torch.save(base.state_dict(), folder / "state.pt")
    expected, found = digests(tmp_path / "apart"), digests(tmp_path / "gathered")
    assert expected.keys() == found.keys()
    same = torch.load(tmp_path / "apart" / "state.pt"), torch.load(tmp_path / "gathered" / "state.pt")
    assert all(torch.equal(same[1][key], value) for key, value in same[0].items())
    assert {file for file in expected if expected[file] != found[file]} <= {"state.pt"}


def test_a_gathered_model_moves_casts_and_copies_as_ever() -> None:
    model = gather_all(model_of("llama"))
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = copy.deepcopy(model)
    assert all(torch.equal(tensor, values[name]) for name, tensor in copied.state_dict().items())
    copied.to(torch.float64)
    assert all(torch.equal(tensor, values[name].double()) for name, tensor in copied.state_dict().items())
    model.load_state_dict(values)
    model.merge_adapter()
    model.unmerge_adapter()
    later = model.state_dict()
    assert all(torch.allclose(later[name], tensor, atol=1e-6) for name, tensor in values.items())


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_models_give_the_same_bits(double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    outputs = []
    for gathers in (False, True):
        base = tiny_model("llama").to(DEVICE, torch.bfloat16 if ON_GPU else torch.float32)
        model = add_adapter(quantise_4bit(base, double)).to(DEVICE)
        bind(model, strict=True)
        if gathers:
            gather_all(model)
        outputs.append((TrainingStep(model).run(*collated(rows())).loss, gradients(model)))
    (loss, expected), (same, found) = outputs
    assert torch.equal(same, loss)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


# --- when they move -----------------------------------------------------------------------------------------------


def segment(address: int, *blocks: tuple[int, str]) -> dict[str, Any]:
    listed = [{"size": size, "requested_size": size, "state": state} for size, state in blocks]
    return {"address": address, "total_size": sum(size for size, _ in blocks), "blocks": listed}


def test_segments_are_given_back_when_all_in_them_moves() -> None:
    moved = {1000: 512, 2000: 512, 2512: 256, 3512: 512, 4000: 100}
    whole = segment(1000, (512, "active_allocated"), (512, "inactive"))
    two = segment(2000, (512, "active_allocated"), (256, "active_allocated"))
    other = segment(3000, (512, "active_allocated"), (512, "active_allocated"))
    larger = segment(4000, (512, "active_allocated"))
    nothing = segment(5000, (512, "inactive"))
    assert released([whole, two, other, larger, nothing], moved) == 1024 + 768
    assert released([], moved) == 0
    assert staying([whole, two, other, larger, nothing], moved) == [512], "beside what moves, and does not"


def around(model: Any, wasted: int) -> list[dict[str, Any]]:
    """Every tensor of a model in a segment of its own, the first with so much unused."""
    found = []
    for parameter in model.parameters():
        parts = [(parameter.nbytes, "active_allocated")] + ([] if found else [(wasted, "inactive")])
        found.append(segment(parameter.data_ptr(), *parts))
    return found


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose allocator holds 64 MiB in vain; what it is asked with, and whether it moved."""
    model = model_of("llama", num_hidden_layers=4)
    monkeypatch.setattr(gathered, "joins", lambda device: True)
    monkeypatch.setattr(gathered, "_segments", lambda device: around(model, 64 * MIB))
    return model


def moved_by(model: Any, budget: int) -> bool:
    weight = model.get_base_model().model.layers[0].mlp.gate_proj.base_layer.weight
    before = weight.data_ptr()
    saved = gather_for(binding_of(model), budget, BATCH)
    assert (weight.data_ptr() != before) == (saved > 0)
    return saved > 0


def test_weights_move_where_not_everything_can_be_kept(on_gpu: Any) -> None:
    shape = shape_of(binding_of(on_gpu))
    everything = with_margin(estimate(shape, "all", BATCH).reserved, shape)
    tensors = sum(parameter.nbytes for parameter in on_gpu.parameters())
    gathering = gathering_of(binding_of(on_gpu))
    saved = gathering.saves(around(on_gpu, 64 * MIB))
    assert saved == 64 * MIB + tensors + 2 * MIB - gathering.takes(), (
        "weights that are to lie together are given back"
    )
    assert not moved_by(on_gpu, everything + 100 * MIB), "there is room"
    assert moved_by(on_gpu, everything + 10 * MIB), "there is, but for what the allocator rounds"


def test_weights_move_where_a_step_would_not_fit(on_gpu: Any) -> None:
    shape = shape_of(binding_of(on_gpu))
    assert moved_by(on_gpu, with_margin(leanest(shape, BATCH, rates_of("H200")).reserved, shape))


@pytest.mark.parametrize(
    "why", ["nothing saved", "host", "laid out", "elsewhere", "trained", "kept in place"]
)
def test_weights_stay(on_gpu: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    binding = binding_of(on_gpu)
    if why == "nothing saved":
        monkeypatch.setattr(gathered, "_segments", lambda device: [])
    elif why == "host":
        monkeypatch.setattr(gathered, "available_host_bytes", lambda: 1000)
    elif why == "laid out":
        binding.laid_out = True
    elif why == "elsewhere":
        binding.elsewhere = 1
    elif why == "trained":
        on_gpu.requires_grad_(True)
        monkeypatch.setattr(gathered, "shape_of", lambda binding: _Trained())
    elif why == "kept in place":
        keep_in_place(on_gpu.parameters())
    assert not moved_by(on_gpu, 64 * MIB)


class _Trained:
    trained = "all"


@gpu_only[0]
@gpu_only[1]
def test_the_allocator_then_holds_what_was_said() -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    bind(model, strict=True)
    gathering, device = gathering_of(binding_of(model)), torch.device(DEVICE)
    saves, before = gathering.saves(gathered._segments(device)), torch.cuda.memory_reserved()
    gather(gathering.blocks, gathering.aside)
    torch.cuda.empty_cache()
    less = before + gathering.together - torch.cuda.memory_reserved()
    assert abs(less - saves) <= 4 * MIB
    assert gathering_of(binding_of(model)).saves(gathered._segments(device)) <= 4 * MIB, "once is all"


def meta_1_5b() -> Any:
    """Sizes of Qwen2.5-1.5B with adapters of rank 16 on all linear layers; no memory."""
    config = Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    bind(model, strict=True)
    return model


def test_1_5b_in_3_4_gib_takes_gathered_weights() -> None:
    """What the allocator holds apart, and together: the plan made of sizes is the one with the buffers."""
    model, batch = meta_1_5b(), Batch(2048, 2048, 2)
    binding = binding_of(model)
    gathering = gathering_of(binding)
    tensors = [tensor for block in gathering.blocks for tensor in block.tensors]
    # As Transformers loads it: a segment for all, from which what is smaller than a mebibyte is not taken.
    apart = Allocator()
    apart.free(apart.new(sum(tensor.nbytes for tensor in tensors)))
    for tensor in tensors:
        apart.new(tensor.nbytes)
    together = Allocator()
    for block in gathering.aside:
        together.new(block.nbytes)
    saved = apart.reserved + gathering.together - (gathering.takes() - together.reserved)
    assert saved > 0.09 * GIB

    shape, rates = replace(shape_of(binding), joined=True, attention="cudnn"), rates_of("H200")
    laid_out = Allocator()
    for size in shape.laid_out_tensors():
        laid_out.new(size)
    # Angles' frequencies and the like take a small segment.
    placed = gathering.takes() - together.reserved + laid_out.reserved + 2 * MIB
    budget = int(3.4 * GIB)
    by_sizes = plan(shape, budget, batch, rates=rates)
    measured = plan(replace(shape, placed=placed), budget, batch, rates=rates)
    differ = [one != two for one, two in zip(measured.levels, by_sizes.levels, strict=True)]
    assert sum(differ) <= 1
    # What the allocator of an H200 held for it.
    held = plan(replace(shape, placed=3_284_140_032), budget, batch, rates=rates)
    for found in (by_sizes, measured, held):
        assert 3.38 * GIB < with_margin(found.estimate.reserved, shape) <= budget
    with pytest.raises(BudgetTooSmall):
        plan(replace(shape, placed=placed + saved), budget, batch, rates=rates)
