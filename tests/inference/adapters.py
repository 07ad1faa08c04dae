"""A tiny base model on disk with adapters that change what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import save_tiny, tiny_tokenizer

OWN_TEMPLATE = "Q: {{ messages[-1]['content'] }}\nA:"


def save_base_and_adapters(path: Path) -> Path:
    """`base`, and the adapters `formal` and `casual.v2`; the second has a chat template of its own."""
    save_tiny(path / "base", "llama")
    for i, name in enumerate(["formal", "casual.v2"]):
        model = AutoModelForCausalLM.from_pretrained(path / "base")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(i)
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0.0, 0.3)
        model.save_pretrained(path / name)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OWN_TEMPLATE
    tokenizer.save_pretrained(path / "casual.v2")
    return path


def stock_model(path: Path, name: str) -> Any:
    """What Transformers and PEFT load."""
    model = AutoModelForCausalLM.from_pretrained(path / "base")
    return model if name == "base" else peft.PeftModel.from_pretrained(model, path / name)


def stock_tokenizer(name: str) -> Any:
    tokenizer = tiny_tokenizer()
    if name == "casual.v2":
        tokenizer.chat_template = OWN_TEMPLATE
    return tokenizer


def stock_answer(path: Path, name: str, messages: list[dict[str, str]], count: int) -> str:
    """The greedy answer of Transformers and PEFT."""
    model, tokenizer = stock_model(path, name), stock_tokenizer(name)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
