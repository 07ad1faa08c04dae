"""Merged checkpoints of mixtures of experts, of plain stacks and of ones held in 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pronghorn.export import save_merged
from pronghorn.loading import FastLanguageModel
from pronghorn.loading.experts import quantise_experts
from tests.families.mixtures import tiny_mixture
from tests.tiny import tiny_tokenizer

CASES = {"qwen3_moe": False, "qwen2_moe": True, "gpt_oss": True, "deepseek_v3": False, "deepseek_v2": True}


@pytest.mark.parametrize(("family", "four_bit"), CASES.items(), ids=CASES)
def test_a_merged_checkpoint_answers_as_the_model(family: str, four_bit: bool, tmp_path: Path) -> None:
    model = tiny_mixture(family)
    if four_bit:
        pytest.importorskip("bitsandbytes")
        quantise_experts(model, "nf4", True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        expected = model.eval()(input_ids=ids, use_cache=False).logits
        save_merged(model, tiny_tokenizer(), tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert (merged(input_ids=ids, use_cache=False).logits - expected).abs().max() < 1e-4
