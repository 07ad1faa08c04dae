"""Logits, both losses and every gradient against the formulas written out, for every published layout, in fp64."""

import pytest
import torch

from pronghorn.engine import binding_of
from pronghorn.speech import SpeechRows, add_speech_adapter, load_speech
from pronghorn.speech.collator import SpeechCollator
from pronghorn.speech.memory import SpeechMemory
from pronghorn.speech.names import join, published_parts
from tests.speech import reference
from tests.speech.tiny import FLAT, LAYOUTS, NESTED, random_codes, random_tensors, save_speech_tiny

TEXTS = ["One says this.", "Another one, in a voice.", "Ü!"]


@pytest.fixture(scope="module", params=LAYOUTS)
def case(request, tmp_path_factory):
    """(layout, model in fp64, tokenizer, rows)."""
    folder = save_speech_tiny(tmp_path_factory.mktemp("speech") / request.param, request.param)
    model, tokenizer = load_speech(folder, dtype=torch.float64)
    rows = SpeechRows(model.config, tokenizer)
    given = [{"text": text, "codes": random_codes(2 + 3 * i, seed=i)} for i, text in enumerate(TEXTS)]
    given[1] |= {"reference_text": "Somebody.", "reference_codes": random_codes(4, seed=9).tolist()}
    return request.param, model, tokenizer, [rows.row(row) for row in given]


def batch_of(tokenizer, rows):
    """What the trainer hands to the model."""
    batch = SpeechCollator(tokenizer.semantic)(rows)
    return {name: value for name, value in batch.items() if name not in SpeechMemory.bookkeeping}


def sizes_of(layout):
    if layout != "nested":
        return LAYOUTS[layout]
    fast = {f"fast_{k}": v for k, v in NESTED["audio_decoder_config"].items()}
    more = {"n_fast_layer": 2, "scale_codebook_embeddings": True, "norm_fastlayer_input": True}
    return NESTED["text_config"] | fast | more


def expected_of(layout, tokenizer, rows, weights):
    first = tokenizer.semantic[0]
    tensors = [{name: torch.as_tensor(value) for name, value in row.items()} for row in rows]
    return [reference.forward(weights, sizes_of(layout), first, row) for row in tensors]


def weights_of(layout):
    drawn = {n: t.double().requires_grad_() for n, t in random_tensors(LAYOUTS[layout]).items()}
    return drawn, reference.flat_names(drawn)


def close(actual, expected, what):
    # fp64 on both sides: what differs is the order of sums of some hundred terms.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10, msg=lambda m: f"{what}: {m}")


def test_logits_losses_and_gradients(case):
    layout, model, tokenizer, rows = case
    drawn, weights = weights_of(layout)
    expected = expected_of(layout, tokenizer, rows, weights)
    batch = batch_of(tokenizer, rows)
    model.train().requires_grad_(True).zero_grad()
    output = model(**batch, token_count=1, code_count=1, code_weight=0.5, return_logits=True)
    close(output.token_logits[0], torch.cat([e["token_logits"] for e in expected]), "token logits")
    close(output.code_logits, torch.cat([e["code_logits"] for e in expected]), "code logits")
    token_loss, code_loss = (sum(e[name] for e in expected) for name in ("token_loss", "code_loss"))
    close(output.token_loss, token_loss, "token loss")
    close(output.code_loss, code_loss, "code loss")
    (token_loss + 0.5 * code_loss).backward()
    output.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parts in published_parts(model.config).items():
        close(join(parts, found), drawn[name].grad, f"gradient of {name}")
    model.eval().requires_grad_(False)


def test_training_takes_the_fast_path(case, monkeypatch):
    """The stock layers are never called, whatever looks at what they give."""
    _, model, tokenizer, rows = case
    batch = batch_of(tokenizer, rows)

    def refuse(*arguments, **kwargs):
        pytest.fail("a stock layer ran")

    for decoder in (model.slow, model.fast):
        assert binding_of(decoder).bound
        monkeypatch.setattr(type(decoder.model.layers[0]), "forward", refuse)
    assert model.train()(**batch).loss > 0
    model.eval()


@pytest.mark.parametrize("half", ["both", "slow", "fast"])
def test_adapter_gradients(half, tmp_path):
    """The gradients of A and B are those that the merged weight's gradient gives: dB = s dW Aᵀ, dA = s Bᵀ dW."""
    model, tokenizer = load_speech(save_speech_tiny(tmp_path), dtype=torch.float64)
    rows = SpeechRows(model.config, tokenizer)
    batch = batch_of(tokenizer, [rows.row({"text": "Some.", "codes": random_codes(5)})])
    adapted = add_speech_adapter(model, r=4, lora_alpha=8, half=half).train()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_" in name:
                parameter.data = parameter.double()
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(index))
    adapted(**batch).loss.backward()
    layers = {n: m for n, m in adapted.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    assert len(layers) == {"both": 28, "slow": 14, "fast": 14}[half]
    merged, _ = load_speech(tmp_path, dtype=torch.float64)
    for name, module in layers.items():
        target = merged.get_submodule(name.removeprefix("base_model.model."))
        with torch.no_grad():
            target.weight += module.get_delta_weight("default")
        target.weight.requires_grad_(True)
    merged.train()(**batch).loss.backward()
    for name, module in layers.items():
        gradient = merged.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        a, b, s = module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]
        close(b.grad, s * gradient @ a.T, f"B of {name}")
        close(a.grad, s * b.T @ gradient, f"A of {name}")


def test_save_levels_give_the_same_gradients(tmp_path):
    folder = save_speech_tiny(tmp_path)
    found = []
    for level in ("all", "none"):
        model, tokenizer = load_speech(folder, dtype=torch.float64, save_levels=level)
        row = SpeechRows(model.config, tokenizer).row({"text": "Some.", "codes": random_codes(5)})
        batch = batch_of(tokenizer, [row])
        model.train().requires_grad_(True)
        model(**batch).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        close(found[1][name], gradient, name)


def test_a_row_without_frames_has_a_loss_of_tokens_alone(tmp_path):
    model, _ = load_speech(save_speech_tiny(tmp_path))
    ids = torch.tensor([[5, 6, 7, 8]])
    codes = torch.zeros(1, FLAT["num_codebooks"], 4, dtype=torch.long)
    output = model.train()(input_ids=ids, codes=codes, labels=ids)
    assert output.code_loss == 0 and output.loss == output.token_loss > 0
