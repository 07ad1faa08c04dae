"""`model.generate` after `for_inference`: what stock generate gives, or stock generate itself."""

from __future__ import annotations

import copy
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from transformers import GenerationConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

from pronghorn import FastLanguageModel
from pronghorn.engine import bind
from pronghorn.inference.model_generate import EngineGenerate
from tests.inference.test_engine import PROMPTS, prompt
from tests.inference.test_engine_adapters import with_adapters
from tests.tiny import tiny_model, tiny_tokenizer

ONE = torch.tensor([prompt(0, 20)])


@pytest.fixture
def model():
    return FastLanguageModel.for_inference(tiny_model("llama", seed=2))


def stock(model, *args, **given):
    return type(model).generate(model, *args, **given)


def padded(rows, pad=0):
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def through_engine(model) -> bool:
    return model.__dict__["generate"]._engine is not None


@pytest.mark.parametrize(
    "given",
    [
        {"max_new_tokens": 12},
        {"max_length": 30},
        {"max_new_tokens": 12, "eos_token_id": [10, 76, 300]},
        {"max_new_tokens": 20, "repetition_penalty": 1.7},
        {"generation_config": GenerationConfig(max_new_tokens=9, repetition_penalty=0.8)},
        {"max_new_tokens": 6, "num_return_sequences": 1, "use_cache": False},
        {},
    ],
)
def test_greedy_is_stock_greedy(model, given):
    expected = stock(model, ONE, do_sample=False, pad_token_id=0, **copy.deepcopy(given))
    assert torch.equal(model.generate(ONE, do_sample=False, pad_token_id=0, **given), expected)
    assert through_engine(model)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_rows_padded_on_the_left(model, penalty):
    # An end that comes at different places, so that rows end in padding.
    free = stock(model, ONE, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    given = {
        **padded(PROMPTS[:4]), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 5,
        "eos_token_id": free[0, -6:].tolist() + list(range(0, 320, 9)), "repetition_penalty": penalty,
    }  # fmt: skip
    expected = stock(model, **given)
    assert torch.equal(model.generate(**given), expected)
    assert (expected == 5).any() and through_engine(model)


def test_padding_is_no_part_of_the_prompt_for_the_penalty(model):
    said = stock(model, ONE, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1].item()
    given = {
        **padded([ONE[0].tolist(), prompt(3, 24)], pad=said), "max_new_tokens": 8, "do_sample": False,
        "pad_token_id": said, "eos_token_id": None, "repetition_penalty": 3.0,
    }  # fmt: skip
    assert torch.equal(model.generate(**given), stock(model, **given)) and through_engine(model)


def test_sampling_follows_torchs_seed(model):
    given = {"do_sample": True, "temperature": 1.3, "top_k": 50, "top_p": 0.95, "max_new_tokens": 16}

    def sampled(seed):
        torch.manual_seed(seed)
        return model.generate(ONE, num_return_sequences=3, pad_token_id=0, eos_token_id=None, **given)

    first = sampled(1)
    assert torch.equal(first, sampled(1)) and not torch.equal(first, sampled(2))
    assert len({tuple(row) for row in first.tolist()}) == 3 and first.shape == (3, 36)


def test_top_p_of_nothing_is_the_likeliest_token(model):
    given = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ONE, do_sample=True, top_p=0.0, **given)
    assert torch.equal(found, stock(model, ONE, do_sample=False, **given)) and through_engine(model)


def test_threads_wait_for_each_other(model):
    prompts = [torch.tensor([prompt(seed, 20)]) for seed in range(8)]
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: model.generate(ids, **given), prompts))
    assert all(torch.equal(a, stock(model, ids, **given)) for a, ids in zip(found, prompts, strict=True))
    assert through_engine(model)


def test_a_streamer_that_asks_again(model, caplog):
    given = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    other, inner = torch.tensor([prompt(4, 9)]), []

    class Asks(Kept):
        def put(self, value):
            inner.append(model.generate(other, **given))

    assert torch.equal(model.generate(ONE, streamer=Asks(), **given), stock(model, ONE, **given))
    assert len(inner) == 4 and all(torch.equal(one, stock(model, other, **given)) for one in inner)
    assert "from within another answer" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype, caplog):
    model = FastLanguageModel.for_inference(tiny_model("llama", dtype=dtype))
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(ONE, **given)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = stock(model, ONE, **given), model.generate(ONE, **given)
    assert torch.equal(found, expected if dtype == torch.float32 else alone)
    assert ("autocast to torch.bfloat16" in caplog.text) == (dtype == torch.float32)
    assert torch.equal(model.generate(ONE, **given), alone)


class Kept(BaseStreamer):
    def __init__(self):
        self.put_in, self.ended = [], 0

    def put(self, value):
        self.put_in.append(value.clone())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("ends", [13, [13, 200], torch.tensor([13, 200]), torch.tensor(200)])
def test_tokens_that_end_an_answer(model, ends):
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    free = stock(model, ONE, **given, eos_token_id=None)[0, ONE.shape[1] :]
    ends = torch.where(torch.as_tensor(ends) == 13, free[2], free[4])
    for kind in (ends, ends.tolist()):
        expected = stock(model, ONE, **given, eos_token_id=kind)
        assert expected.shape[1] < ONE.shape[1] + 6
        assert torch.equal(model.generate(ONE, **given, eos_token_id=kind), expected)


def test_transformers_makes_no_cache(model, monkeypatch):
    """Its preparation would make one for every layer, which the engine does not use."""

    def refuses(*args, **kwargs):
        raise AssertionError("a cache was made")

    monkeypatch.setattr("transformers.generation.utils.DynamicCache", refuses)
    given = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ONE, use_cache=True, **given).shape[1] == ONE.shape[1] + 3
    with pytest.raises(AssertionError, match="a cache was made"):
        model.generate(ONE, num_beams=2, **given)


def test_a_streamer_gets_what_stock_gives_it(model):
    ours, theirs = Kept(), Kept()
    given = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    model.generate(ONE, streamer=ours, **given)
    stock(model, ONE, streamer=theirs, **given)
    assert ours.ended == theirs.ended == 1
    assert [value.tolist() for value in ours.put_in] == [value.tolist() for value in theirs.put_in]


def test_text_is_streamed(model, capsys):
    tokenizer = tiny_tokenizer()
    out = model.generate(
        ONE, streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=6, do_sample=False
    )
    assert capsys.readouterr().out.strip() == tokenizer.decode(out[0, 20:]).strip()


def test_an_interrupted_answer_leaves_nothing_behind(model):
    class Stops(Kept):
        def put(self, value):
            super().put(value)
            if len(self.put_in) == 3:
                raise KeyboardInterrupt

    given = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(KeyboardInterrupt):
        model.generate(ONE, streamer=Stops(), **given)
    engine = model.__dict__["generate"]._engine
    assert not engine.has_work and engine.free_blocks == engine.total_blocks
    assert torch.equal(model.generate(ONE, **given), stock(model, ONE, **given))


@pytest.mark.parametrize(
    "given,reason",
    [
        ({"num_beams": 2}, "beam"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"bad_words_ids": [[7]]}, "NoBadWords"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
        ({"logits_processor": [lambda ids, scores: scores]}, "logits_processor"),
        ({"stopping_criteria": [lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)]}, "stopping_criteria"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"attention_mask": torch.tensor([[1] * 19 + [0]])}, "padded on the left"),
        ({"attention_mask": torch.tensor([[0] * 3 + [1] * 4 + [0] + [1] * 12])}, "padded on the left"),
    ],
)  # fmt: skip
def test_what_the_engine_does_not_do_is_stocks(model, given, reason, caplog):
    given = {**given, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = stock(model, ONE, **given)
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        found = [model.generate(ONE, **given) for _ in range(2)]
    told = [r.message for r in caplog.records if "Transformers' own loop" in r.message]
    assert len(told) == 1 and reason in told[0]
    for one in found:
        assert torch.equal(getattr(one, "sequences", one), getattr(expected, "sequences", expected))


def test_adapters_are_those_the_model_runs(caplog):
    model = FastLanguageModel.for_inference(with_adapters(tiny_model("llama"), {"first": 4, "second": 8}))
    base = model.get_base_model()
    given = {
        "input_ids": ONE,
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    found = []
    for name in ("first", "second"):
        model.set_adapter(name)
        found.append(model.generate(**given))
        assert torch.equal(found[-1], stock(base, **given))
    with model.disable_adapter():
        found.append(model.generate(**given))
        assert torch.equal(found[-1], stock(base, **given))
    assert not any(torch.equal(found[i], found[i - 1]) for i in range(3))
    assert "own loop" not in caplog.text
    model.base_model.set_adapter(["first", "second"])
    assert torch.equal(model.generate(**given), stock(base, **given))
    assert "several adapters" in caplog.text
    # PEFT's adapters by row work through hooks, which the engine leaves to the modules.
    mixed = {"input_ids": ONE.repeat(2, 1), "adapter_names": ["first", "__base__"]}
    rows = model.generate(**{**given, **mixed})
    assert torch.equal(rows[:1], found[0]) and torch.equal(rows[1:], found[2])


def negated(module, inputs, output):
    if not isinstance(output, torch.Tensor):
        output.logits = -output.logits
        return output
    return -output


@pytest.mark.parametrize(
    "part",
    ["model.layers.1.mlp.act_fn", "model.layers.0.self_attn.q_proj", "model.norm", "model.layers.1", ""],
)
def test_a_hook_put_on_later_is_run(model, part, caplog):
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ONE, **given)
    handle = model.get_submodule(part).register_forward_hook(negated)
    assert torch.equal(model.generate(ONE, **given), stock(model, ONE, **given))
    assert "own loop" in caplog.text
    handle.remove()
    assert torch.equal(model.generate(ONE, **given), before)


def trained_by_a_fused_optimizer(model):
    """Which counts no versions of what it writes to."""
    trained = [p for p in model.parameters() if p.requires_grad]
    versions = [p._version for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [p._version for p in trained] == versions


def written_to_as_data(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False).data.mul_(-3.0)


def negated_as_data(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.neg_()


def with_other_angles(model):
    decoder = model.get_base_model().model
    config = copy.deepcopy(decoder.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 20.0}
    decoder.rotary_emb = type(decoder.rotary_emb)(config)


def with_a_forward_of_its_own(model):
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = lambda x, forward=mlp.forward: -forward(x)


@pytest.mark.parametrize(
    "change",
    [
        trained_by_a_fused_optimizer,
        written_to_as_data,
        negated_as_data,
        with_other_angles,
        with_a_forward_of_its_own,
    ],
)
def test_changes_that_nobody_counts_are_seen(change):
    model = FastLanguageModel.for_inference(with_adapters(tiny_model("llama"), {"only": 4}))
    given = {"input_ids": ONE, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(**given)
    assert torch.equal(model.generate(**given), before)
    change(model)
    expected = stock(model.get_base_model(), **given)
    assert not torch.equal(expected, before)
    assert torch.equal(model.generate(**given), expected)


@pytest.mark.parametrize("part", ["", "model", "model.layers.1"])
def test_a_forward_that_was_there_before_is_run(part, caplog):
    model = tiny_model("llama", seed=2)
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    module = model.get_submodule(part)

    def turned(*args, forward=module.forward, **kwargs):
        out = forward(*args, **kwargs)
        for name in ("logits", "last_hidden_state"):
            if hasattr(out, name):
                setattr(out, name, -getattr(out, name))
        return -out if isinstance(out, torch.Tensor) else out

    before = stock(model, ONE, **given)
    module.forward = turned
    expected = stock(model, ONE, **given)
    FastLanguageModel.for_inference(model)
    assert torch.equal(model.generate(ONE, **given), expected) and not torch.equal(expected, before)
    assert "has a forward of its own" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        TrainableTokensConfig(token_indices=list(range(320))),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_of_peft(config):
    def adapted():
        torch.manual_seed(1)
        model = get_peft_model(tiny_model("llama"), copy.deepcopy(config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
        return model.eval()

    given = {
        "input_ids": ONE,
        "attention_mask": torch.ones_like(ONE),
        "max_new_tokens": 8,
        "do_sample": False,
    }
    given |= {"pad_token_id": 0, "eos_token_id": None}
    model, expected = FastLanguageModel.for_inference(adapted()), adapted().generate(**given)
    assert torch.equal(model.generate(**given), expected)
    assert not torch.equal(tiny_model("llama").generate(**given), expected)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_that_come_after_answers(config):
    def adapted(model):
        torch.manual_seed(1)
        model = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=4))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        return model.eval()

    given = {
        "input_ids": ONE,
        "attention_mask": torch.ones_like(ONE),
        "max_new_tokens": 8,
        "do_sample": False,
    }
    given |= {"pad_token_id": 0, "eos_token_id": None}
    base = FastLanguageModel.for_inference(tiny_model("llama").requires_grad_(False))
    before, expected = base.generate(**given), adapted(tiny_model("llama")).generate(**given)
    assert torch.equal(adapted(base).generate(**given), expected) and not torch.equal(before, expected)


def test_a_whole_model_trained_in_mixed_precision(monkeypatch):
    """accelerate lays a forward over the model, once for each trainer."""
    # Its settings are the process's, and other tests' trainers have made them.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    model = FastLanguageModel.for_inference(tiny_model("llama"))
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = stock(model, ONE, **given)
    for _ in range(2):
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        model = accelerator.prepare_model(model)
    assert "convert_outputs_to_fp32" in str(model.__dict__["forward"])
    assert torch.equal(model.generate(ONE, **given), expected) and through_engine(model)
    other = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(tiny_model("llama"))
    assert bind(other).bound


def test_a_model_in_64_bits():
    model = FastLanguageModel.for_inference(tiny_model("llama").double())
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ONE, **given), stock(model, ONE, **given)) and through_engine(model)


def test_training_after_answering():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    FastLanguageModel.for_inference(model)
    given = {"input_ids": ONE, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        before = model.generate(**given)
    FastLanguageModel.for_training(model)
    assert "generate" not in model.get_base_model().__dict__
    loss = model(input_ids=ONE, labels=ONE, use_cache=False).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    FastLanguageModel.for_inference(model)
    assert torch.equal(model.generate(**given), before)


def test_copies_and_pickles_go_without_the_engine(model):
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ONE, **given)
    copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, unpickled):
        bound = other.__dict__["generate"]
        assert isinstance(bound, EngineGenerate) and bound.model is other and bound._engine is None
        with torch.no_grad():
            other.lm_head.weight.neg_()
        assert torch.equal(other.generate(ONE, **given), stock(other, ONE, **given))
    assert torch.equal(model.generate(ONE, **given), expected)


def test_a_model_of_an_unknown_family_keeps_its_own_generate(caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=64)).eval()
    FastLanguageModel.for_inference(model)
    ids = torch.tensor([[3, 5, 7]])
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **given), stock(model, ids, **given))
    assert "no family file" in caplog.text
