"""Several adapters on one base, one a request, and stored weights of every kind."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pronghorn.errors import AdapterUnknown, EngineRefused
from pronghorn.inference.engine import Engine
from tests.inference.test_engine import PROMPTS, assert_same, run, run_tokens, sampled
from tests.tiny import draw_adapters_, tiny_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapters(model, ranks: dict[str, int], targets=TARGETS, **config):
    """A PEFT model with adapters of these ranks whose B is not zero."""
    peft = None
    for seed, (name, rank) in enumerate(ranks.items()):
        chosen = targets if seed % 2 == 0 else targets[1:5]
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=chosen, **config)
        if peft is None:
            peft = get_peft_model(model, lora, adapter_name=name)
        else:
            peft.add_adapter(name, lora)
    draw_adapters_(peft, 0.1)
    return peft.eval()


@pytest.fixture(scope="module")
def model():
    return with_adapters(tiny_model("llama"), {"first": 4, "second": 8})


def stock_logprob(model, request, answer) -> float:
    """The log-probability of an answer's last token by the stock forward with the request's adapter."""
    ids = [*request.prompt_ids, *(token.id for token in answer)]
    with torch.no_grad():
        if request.adapter is None:
            with model.disable_adapter():
                logits = model(torch.tensor([ids[:-1]])).logits
        else:
            model.set_adapter(request.adapter)
            logits = model(torch.tensor([ids[:-1]])).logits
    return float(logits[0, -1].log_softmax(-1)[ids[-1]])


def test_adapters_in_one_batch_answer_as_alone(model):
    adapters = [None, "first", "second", "first", None]
    requests = [sampled(ids, adapter) for ids, adapter in zip(PROMPTS, adapters, strict=True)]
    alone = [run_tokens(Engine(model, max_context=256), [request])[0] for request in requests]
    for request, answer in zip(requests, alone, strict=True):
        assert abs(stock_logprob(model, request, answer) - answer[-1].logprob) < 1e-5
    model.set_adapter("first")
    engine = Engine(model, max_batch=4, max_context=256, cache_tokens=8 * 64)
    assert engine.adapters == ("first", "second")
    assert_same(run_tokens(engine, requests, [0, 0, 1, 3, 3]), alone)
    # The same prompt through another adapter shares nothing with it.
    three = [sampled(PROMPTS[4], adapter) for adapter in (None, "first", "second")]
    found = run_tokens(engine, three)
    assert_same(found, [run_tokens(Engine(model, max_context=256), [request])[0] for request in three])
    assert found[0] != found[1] != found[2]


def test_an_adapter_trained_on_is_seen(model):
    engine = Engine(model, max_context=256)
    request = sampled(PROMPTS[1], "second")
    before = run(engine, [request])
    with torch.no_grad():
        layer = model.base_model.model.model.layers[0].self_attn.o_proj
        layer.lora_B["second"].weight.mul_(-3.0)
    answer = run_tokens(engine, [request])[0]
    assert abs(stock_logprob(model, request, answer) - answer[-1].logprob) < 1e-5
    assert [token.id for token in answer] != before[0]


def test_a_merged_adapter_is_the_base():
    model = with_adapters(tiny_model("llama"), {"only": 4})
    answer = run_tokens(Engine(model, max_context=256), [sampled(PROMPTS[2], "only")])
    model.merge_adapter()
    engine = Engine(model, max_context=256)
    assert engine.adapters == ()
    merged = run_tokens(engine, [sampled(PROMPTS[2])])
    assert [t.id for t in merged[0]] == [t.id for t in answer[0]]


def test_trained_copies_of_modules_belong_to_the_active_adapter():
    model = with_adapters(tiny_model("llama"), {"only": 4}, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["only"].weight.mul_(-1.0)
    request = sampled(PROMPTS[1], "only")
    engine = Engine(model, max_context=256)
    answer = run_tokens(engine, [request])[0]
    assert abs(stock_logprob(model, request, answer) - answer[-1].logprob) < 1e-5
    with pytest.raises(AdapterUnknown, match="only"):
        engine.submit(sampled(PROMPTS[1]))


@pytest.mark.parametrize(
    "config", [{"targets": [*TARGETS, "embed_tokens"]}, {"trainable_token_indices": list(range(320))}]
)
def test_adapted_embeddings_belong_to_the_active_adapter(config):
    model = with_adapters(tiny_model("llama"), {"only": 4}, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.mul_(-1.0)
    request = sampled(PROMPTS[1], "only")
    engine = Engine(model, max_context=256)
    answer = run_tokens(engine, [request])[0]
    assert abs(stock_logprob(model, request, answer) - answer[-1].logprob) < 1e-5
    with pytest.raises(AdapterUnknown, match="only"):
        engine.submit(sampled(PROMPTS[1]))
    base = sampled(PROMPTS[1])
    with model.disable_adapter():
        without = run_tokens(engine, [base])[0]
    assert abs(stock_logprob(model, base, without) - without[-1].logprob) < 1e-5
    assert [token.id for token in without] != [token.id for token in answer]


def test_adapters_that_only_peft_computes_are_refused():
    model = with_adapters(tiny_model("llama"), {"only": 4}, use_dora=True)
    with pytest.raises(EngineRefused, match="PEFT"):
        Engine(model, max_context=64)


def fp8(model):
    from pronghorn.weights import Fp8Linear

    return replaced(model, Fp8Linear.of)


def int8(model):
    from pronghorn.weights import Int8Linear

    return replaced(model, Int8Linear.of)


def nf4(model):
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(linear):
        module = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, False, torch.float32, quant_type="nf4"
        )
        module.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return module.to("cpu")

    return replaced(model, quantised)


def replaced(model, make):
    for layer in model.model.layers:
        for parent in (getattr(layer, "self_attn", None) or layer.linear_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                # Projections of a number a head stay as they are.
                if isinstance(child, torch.nn.Linear) and min(child.weight.shape) >= 16:
                    setattr(parent, name, make(child))
    return model


@pytest.mark.parametrize("store", [nf4, fp8, int8])
def test_weights_in_codes_are_multiplied_where_they_are(store):
    model = with_adapters(store(tiny_model("llama")), {"first": 4, "second": 8})
    stored = {p.data_ptr() for p in model.parameters()}
    requests = [
        sampled(ids, adapter) for ids, adapter in zip(PROMPTS, (None, "first", "second"), strict=False)
    ]
    engine = Engine(model, max_batch=3, max_context=256)
    alone = [run_tokens(Engine(model, max_context=256), [request])[0] for request in requests]
    assert_same(run_tokens(engine, requests, [0, 1, 2]), alone)
    assert stored == {p.data_ptr() for p in model.parameters()}
    # Against the bound forward without a cache, which multiplies the same codes: what prompts are computed with.
    for request, answer in zip(requests, alone, strict=True):
        first = answer[:1]
        model.config.use_cache = False
        assert abs(stock_logprob(model, request, first) - first[-1].logprob) < 1e-5
