"""Loading on a CUDA GPU: placement, 4-bit by default, a training step, merging."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from pronghorn.engine import binding_of
from pronghorn.loading import FastLanguageModel
from tests.tiny import save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

IDS = torch.tensor([[1, 17, 90, 33, 250, 7, 300, 12]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(model.device), use_cache=False).logits.float().cpu()


@pytest.mark.parametrize("four_bit", [None, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_load_adapt_train_merge(tmp_path, family, four_bit):
    path = save_tiny(tmp_path / "base", family)
    model, tokenizer = FastLanguageModel.from_pretrained(str(path), load_in_4bit=four_bit)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    quantised = model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert quantised is (four_bit is None)
    model = FastLanguageModel.get_peft_model(model, r=4)
    assert binding_of(model).bound
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    ids = IDS.cuda()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    expected = logits(model)
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.bfloat16, device_map="cuda"
    )
    # Both models compute in bf16; the merged one has rounded W + sBA once more. The logits are of size 1 and less.
    assert (logits(merged) - expected).abs().max() < 0.05 * expected.abs().max()
    if four_bit is False:
        torch.testing.assert_close(logits(copy.deepcopy(model)), expected, atol=1e-2, rtol=0)
