"""Adapters and 4-bit storage of experts: what users name reaches them, and PEFT saves and loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pronghorn import FastLanguageModel
from pronghorn.engine import bind, binding_of
from pronghorn.errors import AdapterProblem
from pronghorn.loading.experts import quantise_experts
from tests.families.mixtures import MIXTURES, tiny_mixture
from tests.families.parity import relative_error
from tests.tiny import save_tiny

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INPUT = {"input_ids": torch.arange(3, 40).view(1, 37), "use_cache": False}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    return {name: save_tiny(folder / name, name, **options) for name, options in MIXTURES.items()}


def load(path: Path, **options: Any) -> Any:
    model, _ = FastLanguageModel.from_pretrained(
        str(path), **{"dtype": torch.float32, "load_in_4bit": False} | options
    )
    return model


def adapted(model: Any, *, targets: Any = None, **options: Any) -> Any:
    """With an adapter, no matrix of which is zero."""
    names = {} if targets is None else {"target_modules": targets}
    model = FastLanguageModel.get_peft_model(model, r=4, **names, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**INPUT).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", MIXTURES)
def test_no_adapter_is_ignored(family: str) -> None:
    """Every matrix of every adapter, changed alone, changes the output; and the experts of every mixture have some."""
    model = adapted(tiny_mixture(family), targets=SEVEN)
    names = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    mixtures = [name for name, _ in model.named_modules() if name.endswith("experts.base_layer.base_layer")]
    assert mixtures
    for name in mixtures:
        outer = name.removesuffix(".base_layer.base_layer")
        assert {outer, f"{outer}.base_layer"} <= names
    before = logits(model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.05)
        assert (logits(model) - before).abs().max() > 1e-5, name
        with torch.no_grad():
            parameter.copy_(kept)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("targets", [None, "all-linear", SEVEN], ids=["default", "all-linear", "seven"])
@pytest.mark.parametrize("family", MIXTURES)
def test_linear_layers_beside_the_experts_are_adapted(family: str, targets: Any) -> None:
    """A shared expert and dense layers in between, whose names PEFT may take for those of experts."""
    model = adapted(tiny_mixture(family), targets=targets)
    for name, module in model.named_modules():
        last = name.removesuffix(".base_layer").rpartition(".")[2]
        if last in SEVEN and isinstance(module, torch.nn.Linear):
            assert name.endswith(".base_layer"), name
    routers = [name for name, _ in model.named_parameters() if ".mlp.gate." in name and "lora_" in name]
    assert not routers


@pytest.mark.parametrize("family", MIXTURES)
def test_peft_loads_what_was_saved(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(load(checkpoints[family]), targets=SEVEN)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32)
    theirs = logits(PeftModel.from_pretrained(stock, tmp_path))
    assert (theirs - logits(model)).abs().max() < 1e-4
    ours = load(tmp_path)
    assert torch.equal(logits(ours), logits(model))


@pytest.mark.parametrize("family", MIXTURES)
def test_layers_to_transform_hold_for_experts(family: str) -> None:
    model = adapted(tiny_mixture(family), targets=SEVEN, layers_to_transform=[1])
    layers = {name.partition(".layers.")[2][0] for name, _ in model.named_parameters() if "lora_" in name}
    assert layers == {"1"}


def test_half_of_a_stack_is_an_error() -> None:
    with pytest.raises(AdapterProblem, match="'gate_proj' without 'up_proj'"):
        adapted(tiny_mixture("qwen3_moe"), targets=["q_proj", "gate_proj"])


# --- 4 bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_experts_are_held_in_four_bits(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"load_in_4bit": True, "bnb_4bit_use_double_quant": family == "qwen3_moe"}
    model = adapted(load(checkpoints[family], **options), targets=SEVEN)
    assert not [n for n, _ in model.named_parameters() if ".experts." in n and "lora_" not in n]
    packed = [buffer for name, buffer in model.named_buffers() if name.endswith("_proj_packed")]
    assert packed and all(buffer.dtype == torch.uint8 for buffer in packed)
    assert "nf4" in binding_of(model).describe()  # type: ignore[union-attr]
    ours = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, **options)), ours)
    binding_of(model).undo()  # type: ignore[union-attr]
    for _ in range(2):  # Transformers and PEFT on the same codes, and again: nothing is left behind
        assert relative_error(logits(model), ours) < 1e-5
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in model.state_dict())
    # An adapter trained on 4 bits is one of the 16-bit model.
    stock = AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32)
    assert 1e-3 < relative_error(logits(PeftModel.from_pretrained(stock, tmp_path)), ours) < 0.6


def test_moving_experts_held_in_four_bits_takes_no_room() -> None:
    """The empty stacks in the codes' place, which a cast fills with zeros of their own, are empty again."""
    pytest.importorskip("bitsandbytes")
    model = tiny_mixture("mixtral")
    assert quantise_experts(model, "nf4", False) == 2 * 2
    binding = bind(model)
    before = logits(model)
    model.double().float()
    assert torch.equal(logits(model), before)
    empty = [b for name, b in model.named_buffers() if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(empty) == 4 and all(b.untyped_storage().nbytes() == b.element_size() for b in empty)
    assert "experts: 2 of 4 a token in 2 layers, nf4; adapters on 0 of 4 stacks" in binding.describe()
