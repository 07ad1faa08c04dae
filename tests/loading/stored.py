"""What tests of models loaded with 8-bit weights have in common."""

import torch
from transformers import AutoModelForCausalLM

from pronghorn.loading import FastLanguageModel

IDS = torch.tensor([[1, 17, 90, 33, 250, 7, 300, 12]])


def stock(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def adapted(model, **arguments):
    wrapped = FastLanguageModel.get_peft_model(model, r=4, **arguments)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return wrapped


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def gradients(model):
    model.train()
    model.zero_grad()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
