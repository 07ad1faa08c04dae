"""A decoder run layer by layer is the model; moments, gradients and harm are what their definitions say."""

from __future__ import annotations

import pytest
import torch

from pronghorn.quantising.calibration import CalibrationRows
from pronghorn.quantising.dynamic import quantise
from pronghorn.quantising.formats import forms_of, plain_form
from pronghorn.quantising.held_out import HeldOut
from pronghorn.quantising.layers import Decoder, Moments
from pronghorn.quantising.measure import measure, weigh
from pronghorn.quantising.parts import StackPart, parts_of, watching
from pronghorn.quantising.rounding import round_plain
from pronghorn.quantising.settings import DynamicQuantisation
from tests.families.mixtures import tiny_mixture
from tests.tiny import tiny_model

IDS = torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(2))
NAMES = ["model.layers.0", "model.layers.1"]


def test_a_stack_of_experts_is_one_part_whose_products_are_seen():
    """Moments of what its experts read together, and outputs with the expert that gave them."""
    model = tiny_mixture("qwen2_moe")
    model.config._experts_implementation = "grouped_mm"
    decoder, seen = Decoder(model, IDS[:2]), []
    with torch.no_grad():
        (hidden,) = decoder.inputs()
        parts, moments = parts_of(decoder.layers[0]), Moments()
        routed = []
        gate = decoder.layers[0].mlp.gate
        gate.register_forward_hook(lambda _, given, out: routed.append((given[0].flatten(0, -2), out)))

        def note(path, given, output, expert):
            moments.note(path, given)
            seen.append((path, given, output, expert))

        with watching(parts, note):
            decoder.run(0, hidden)
    assert model.config._experts_implementation == "grouped_mm"
    stacks = {path for path, part in parts.items() if isinstance(part, StackPart)}
    assert stacks == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    ((tokens, scores),) = routed
    chosen = next(x for x in scores if not x.is_floating_point())  # [T, k]
    x = tokens.repeat_interleave(chosen.shape[1], 0).double()
    (found,) = [moment for paths, moment in moments.groups() if "mlp.experts.gate_up_proj" in paths]
    assert torch.allclose(found.double(), x.t() @ x / len(x), rtol=1e-4, atol=1e-6)
    gate_up = [
        (given, output, expert) for path, given, output, expert in seen if path.endswith("gate_up_proj")
    ]
    assert sorted(expert for _, _, expert in gate_up) == sorted(set(chosen.flatten().tolist()))
    for given, output, expert in gate_up:
        weight = parts["mlp.experts.gate_up_proj"].stack[expert]
        assert torch.allclose(output, given @ weight.t(), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3", "gemma3_text"])
def test_layer_by_layer_is_the_model(family):
    model = tiny_model(family, attn_implementation="eager")
    decoder = Decoder(model, IDS, tokens_at_once=48)  # rows in chunks of 2, 2, 1
    layers = list(decoder.layers)
    with torch.no_grad():
        hidden = decoder.inputs()
        for index in range(2):
            hidden = [decoder.run(index, chunk) for chunk in hidden]
        found = torch.cat([decoder.logits(c, h) for c, h in zip(decoder.chunks, hidden, strict=True)])
        expected = model(IDS).logits
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert list(model.model.layers) == layers


def test_moments_are_shared_by_modules_with_the_same_input():
    model = tiny_model("llama")
    decoder = Decoder(model, IDS, tokens_at_once=48)
    seen = {}
    parts, moments = parts_of(decoder.layers[0]), Moments()
    for path, part in parts.items():
        part.module.register_forward_pre_hook(
            lambda _, given, path=path: seen.setdefault(path, []).append(given[0].flatten(0, 1))
        )
    with torch.no_grad():
        hidden = decoder.inputs()
        with watching(parts, moments.note):
            for chunk in hidden:
                decoder.run(0, chunk)
    groups = moments.groups()
    assert [[path.split(".")[-1] for path in paths] for paths, _ in groups] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    for paths, moment in groups:
        for path in paths:
            x = torch.cat(seen[path]).double()
            assert torch.allclose(moment.double(), x.t() @ x / len(x), rtol=1e-4, atol=1e-6)


def test_weights_of_errors_are_squared_gradients_of_the_model_s_likelihood():
    from pronghorn.quantising.measure import _draw, _gradient_squares

    model = tiny_model("llama").requires_grad_(False)
    decoder = Decoder(model, IDS)
    found = _gradient_squares(decoder, NAMES, measure(decoder, NAMES, double=True)[1])
    outputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_hook(lambda _, __, y, name=name: outputs.setdefault(name, []).append(y))
    total = dict.fromkeys(found, 0.0)
    for row in IDS:
        embedded = model.model.embed_tokens(row[None]).requires_grad_()
        logits = model(inputs_embeds=embedded).logits[0].float().log_softmax(-1)
        drawn = _draw(logits.detach())
        held = [y[-1] for y in outputs.values()]
        gradients = torch.autograd.grad(logits.gather(1, drawn[:, None]).sum(), held)
        for name, gradient in zip(outputs, gradients, strict=True):
            total[name] = total[name] + gradient[0].square().sum(0)
    for name, squares in total.items():
        assert torch.allclose(found[name], squares / IDS.numel(), rtol=1e-3, atol=1e-9), name


def test_draws_follow_the_probabilities():
    from pronghorn.quantising.measure import _draw

    p = torch.tensor([0.1, 0.6, 0.0, 0.3]).log()
    counts = _draw(p.expand(20000, 4)).bincount(minlength=4) / 20000
    assert torch.allclose(counts, p.exp(), atol=0.015) and counts[2] == 0


def test_harm_is_about_the_divergence_that_rounding_a_module_makes():
    model = tiny_model("llama").requires_grad_(False)
    ids = torch.randint(3, 300, (16, 32), generator=torch.Generator().manual_seed(3))
    decoder = Decoder(model, ids)
    measured, kept = measure(decoder, NAMES, double=True)
    weigh(decoder, NAMES, measured, kept)
    assert len(measured) == 14 and all(set(m.harm) == set(forms_of(m.shape[1], True)) for m in measured)
    with torch.no_grad():
        exact = model(ids).logits.log_softmax(-1)
        ratios = []
        for module in measured:
            weight = model.get_submodule(module.name).weight
            before = weight.clone()
            weight.copy_(round_plain(weight, plain_form(True)).dense())
            other = model(ids).logits.log_softmax(-1)
            weight.copy_(before)
            kl = float((exact.exp() * (exact - other)).sum(-1).mean())
            ratios.append(module.harm[plain_form(True)] / kl)
    found = torch.tensor(ratios)
    assert 0.5 < found.log().mean().exp() < 2 and found.min() > 0.2 and found.max() < 5, found


def test_held_out_rows_are_compared_as_the_whole_models_would_be():
    model = tiny_model("llama").requires_grad_(False)
    with torch.no_grad():
        exact = model(IDS).logits.log_softmax(-1)
        held = HeldOut(Decoder(model, IDS, tokens_at_once=48))
        for index in range(2):
            held.run("exact", index)
            held.run("plain", index)
            model.model.layers[index].mlp.down_proj.weight.mul_(1.05)
            held.run("fitted", index)
        other = model(IDS).logits.log_softmax(-1)
    found = held.compare()
    assert found.plain.kl == pytest.approx(0, abs=1e-6) and found.plain.agreement == 1
    assert found.fitted.kl == pytest.approx(float((exact.exp() * (exact - other)).sum(-1).mean()), rel=1e-3)
    assert found.fitted.agreement == pytest.approx(
        float((exact.argmax(-1) == other.argmax(-1)).float().mean())
    )


def test_layers_may_be_brought_to_a_device_and_back():
    """As for a GPU; nothing but the place differs."""
    found = []
    for device in (None, torch.device("cpu")):
        model = tiny_model("llama")
        rows = CalibrationRows(IDS, IDS[:2])
        report = quantise(model, rows, DynamicQuantisation(extra="20%"), device=device)
        found.append((report.as_dict() | {"seconds": 0}, model(IDS).logits))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
