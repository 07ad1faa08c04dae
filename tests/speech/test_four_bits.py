"""NF4: the gradients are those of the dequantised weights; it trains, speaks and merges."""

import pytest
import torch
from torch import nn

from pronghorn.engine import binding_of
from pronghorn.speech import (
    SpeechConfig,
    SpeechRows,
    SpeechTrainer,
    add_speech_adapter,
    load_speech,
    save_speech,
)
from pronghorn.speech.collator import SpeechCollator
from pronghorn.weights import read_weight
from tests.speech.tiny import random_codes, save_speech_tiny

bnb = pytest.importorskip("bitsandbytes")

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Sizes that NF4's blocks of 64 divide.
    return save_speech_tiny(tmp_path_factory.mktemp("speech"), "nested")


def adapted(model):
    model = add_speech_adapter(model, r=4)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(index))
    return model.train()


def test_gradients_are_those_of_the_dequantised_weights(folder):
    model, tokenizer = load_speech(folder, load_in_4bit=True)
    plain, _ = load_speech(folder)
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            plain.get_submodule(name).weight.data = read_weight(module).dense(torch.float32)
            count += 1
    assert count == 28 and type(model.fast.lm_head) is nn.Linear
    assert "quantised" in binding_of(model.slow).describe()
    row = SpeechRows(model.config, tokenizer).row({"text": "Some.", "codes": random_codes(5)})
    batch = SpeechCollator(tokenizer.semantic)([row])
    batch = {
        name: value for name, value in batch.items() if name not in ("real_tokens", "supervised", "frames")
    }
    found = []
    for each in (adapted(model), adapted(plain)):
        output = each(**batch)
        output.loss.backward()
        found.append((output.loss, {n: p.grad for n, p in each.named_parameters() if p.grad is not None}))
    # fp32 on both sides.
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert len(found[0][1]) == 56
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(
            gradient, found[1][1][name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_training_and_merging(folder, tmp_path):
    model, tokenizer = load_speech(folder, load_in_4bit=True)
    model = add_speech_adapter(model, r=4)
    rows = [SpeechRows(model.config, tokenizer).row({"text": "a", "codes": random_codes(4)})]
    args = SpeechConfig(
        str(tmp_path / "run"),
        max_steps=8,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = SpeechTrainer(model, args, tokenizer, rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "token_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    again, _ = load_speech(tmp_path / "adapter", load_in_4bit=True)
    merged, _ = load_speech(save_speech(model, tokenizer, tmp_path / "merged"))
    ids, codes = (torch.from_numpy(rows[0][name])[None] for name in ("input_ids", "codes"))
    with torch.no_grad():
        logits = [
            m.eval()(input_ids=ids, codes=codes, return_logits=True).token_logits
            for m in (model, again, merged)
        ]
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-3, atol=1e-4)
