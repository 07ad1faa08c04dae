"""Load, train on packed rows, generate, save, reload and merge: what a user does with a model of each kind of layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from pronghorn import FastLanguageModel, SFTConfig, SFTTrainer
from pronghorn.engine import binding_of
from pronghorn.export import save_merged
from tests.families.mixtures import MIXTURES
from tests.families.parity import FAMILIES
from tests.tiny import save_tiny

ROWS = [{"text": f"the pronghorn number {number} eats grass and runs"} for number in range(16)]


def load(path: Path, four_bit: bool = False) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(
        str(path), dtype="float32", max_seq_length=64, load_in_4bit=four_bit, strict=True
    )


@torch.no_grad()
def answers(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model = FastLanguageModel.for_inference(model)
    return model(input_ids=ids.to(model.device), use_cache=False).logits


@pytest.mark.parametrize(
    "family,four_bit",
    [
        *[("cohere", False), ("cohere2", True), ("glm4", False), ("olmo2", True)],
        *[("gemma2", False), ("gemma3_text", True), ("phi3", True), ("granite", False), ("smollm3", False)],
        *[
            ("qwen3_5_text", True),
            ("youtu", True),
            ("deepseek_v3", False),
            ("deepseek_v2", True),
        ],
    ],
)
def test_from_a_checkpoint_to_another(family: str, four_bit: bool, tmp_path: Path) -> None:
    """Gemma's head is tied to its embedding, in the merged checkpoint as well."""
    options = (FAMILIES | MIXTURES)[family]
    model, tokenizer = load(save_tiny(tmp_path / "base", family, **options), four_bit)
    model = FastLanguageModel.get_peft_model(model, r=4)
    binding = binding_of(model)
    assert binding is not None and binding.bound
    settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    settings |= {
        "packing": True,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
    }
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(ROWS),
        args=SFTConfig(output_dir=str(tmp_path / "run"), **settings),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3

    ids = tokenizer("the pronghorn", return_tensors="pt").input_ids
    trained = answers(model, ids)
    said = model.generate(input_ids=ids.to(model.device), max_new_tokens=3, do_sample=False)
    assert said.shape[1] > ids.shape[1]
    model.save_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(answers(load(tmp_path / "adapter", four_bit)[0], ids), trained)
    save_merged(model, tokenizer, str(tmp_path / "merged"))
    merged, _ = load(tmp_path / "merged")
    # Merged in fp32: some hundred terms of 2⁻²⁴ each, through two layers.
    torch.testing.assert_close(answers(merged, ids), trained, atol=1e-5, rtol=1e-5)
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == bool(options.get("tie_word_embeddings", False))
