"""Mixtures of experts in the engine: the answers of stock generation, adapters on attention, experts and router."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pronghorn import FastLanguageModel
from pronghorn.cli.main import main
from pronghorn.inference.engine import Engine
from pronghorn.inference.requests import Request, SamplingParams
from pronghorn.inference.server.loading import load_served
from pronghorn.weights.experts import hold_in_four_bits
from tests.families.mixtures import MIXTURES, STACKS, tiny_mixture
from tests.inference.server.running import ask, running
from tests.inference.test_engine import (
    assert_same,
    greedy,
    prompt,
    recorded_steps_ask_nothing,
    run,
    run_tokens,
    sampled,
    stock,
)
from tests.inference.test_model_generate import through_engine
from tests.tiny import draw_adapters_, save_tiny, tiny_tokenizer

#: their contexts fill one block of the cache, and begin a second
PROMPTS = [prompt(seed, length) for seed, length in enumerate((5, 23, 70))]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
QUESTION = [{"role": "user", "content": "What does it eat?"}]
KINDS = sorted(MIXTURES)


def adapted(model, parameters=STACKS):
    """A PEFT model with `first` on attention and experts, and `second` of another rank; no B is zero."""
    first = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, target_parameters=parameters)
    peft = get_peft_model(model, first, "first")
    second = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters)
    peft.add_adapter("second", second)
    draw_adapters_(peft, 0.2)
    return peft.eval()


def stock_with(model, adapter, ids, count=8) -> list[int]:
    """Stock greedy generation with one adapter or none."""
    base = model.get_base_model()
    if adapter is None:
        with model.disable_adapter():
            return stock(base, ids, count)
    model.set_adapter(adapter)
    return stock(base, ids, count)


@pytest.mark.parametrize("family", KINDS)
def test_greedy_answers_are_those_of_stock_generate(family):
    model = tiny_mixture(family, seed=1)
    expected = [stock(model, ids, 12) for ids in PROMPTS]
    requests = [greedy(ids, count=12) for ids in PROMPTS]
    engine = Engine(model, max_batch=4, max_context=128)
    assert run(engine, requests) == expected
    # Alone, and after what others left.
    assert [run(engine, [request])[0] for request in requests] == expected


@pytest.mark.parametrize("family", KINDS)
def test_adapters_by_request(family):
    model = adapted(tiny_mixture(family))
    adapters = ["first", "second", None]
    expected = [stock_with(model, name, ids) for name, ids in zip(adapters, PROMPTS, strict=True)]
    engine = Engine(model, max_batch=4, max_context=128)
    assert engine.adapters == ("first", "second")
    requests = [greedy(ids, name, 8) for name, ids in zip(adapters, PROMPTS, strict=True)]
    assert run(engine, requests) == expected
    assert stock_with(model, "first", PROMPTS[2]) != expected[2] != stock_with(model, "second", PROMPTS[2])


@pytest.mark.parametrize("family", KINDS)
def test_recorded_steps(family, captured, monkeypatch):
    model = adapted(tiny_mixture(family))
    requests = [sampled(ids, name) for ids, name in zip(PROMPTS, [None, "first", "second"], strict=True)]
    found = run_tokens(Engine(model, max_batch=4, max_context=128), requests, [0, 1, 5])
    monkeypatch.undo()
    assert_same(found, [run_tokens(Engine(model, max_context=128), [request])[0] for request in requests])


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels on a CPU's tensors")
@pytest.mark.parametrize(("family", "rows"), [("qwen2_moe", 1), ("gpt_oss", 2)])
def test_recorded_steps_in_triton(family, rows, captured, monkeypatch):
    """A whole step by the kernels that a GPU runs, and nothing that waits for it: one row, whose products are
    matrix-vector ones, and two."""
    pytest.importorskip("triton")
    from pronghorn.kernels import (
        decode_attention,
        grouped_adapters,
        grouped_glu,
        grouped_matmul,
        grouped_rows,
        matvec,
        routing,
    )

    model = adapted(tiny_mixture(family, num_hidden_layers=1))
    requests = [sampled(PROMPTS[0][:3], "first"), sampled(PROMPTS[0][2:], "second")][:rows]
    expected = [run_tokens(Engine(model, max_context=64), [request])[0][:2] for request in requests]
    kernels = (decode_attention, grouped_adapters, grouped_glu, grouped_matmul, grouped_rows, matvec, routing)
    for module in kernels:
        monkeypatch.setattr(module, "use_triton", lambda tensor, impl: True)
    recorded_steps_ask_nothing(monkeypatch)
    short = [replace(one, sampling=replace(one.sampling, max_new_tokens=2)) for one in requests]
    assert_same(run_tokens(Engine(model, max_batch=rows, max_context=64), short), expected)


def test_trained_experts_adapters_are_put_in_the_tables_that_steps_read(captured):
    model = adapted(tiny_mixture("qwen3_moe"))
    engine = Engine(model, max_context=128)
    request = sampled(PROMPTS[1], "first")
    before = run(engine, [request])
    steps = dict(engine._runner._steps)
    places = [t.data_ptr() for table in engine._runner.fused.tables() if table for t in table.tensors()]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and "lora_B.first" in name:
                parameter.mul_(-1.0)
    after = run(engine, [request])
    assert after != before and after == run(Engine(model, max_context=128), [request])
    assert engine._runner._steps == steps
    tables = [table for table in engine._runner.fused.tables() if table]
    assert places == [t.data_ptr() for table in tables for t in table.tensors()]


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_adapters_of_the_router(family):
    router = {"qwen2_moe": "gate.weight", "gpt_oss": "router.weight"}[family]
    model = adapted(tiny_mixture(family), [router, "experts.down_proj"])
    names = ["second", "first"]
    expected = [stock_with(model, name, ids) for name, ids in zip(names, PROMPTS, strict=False)]
    requests = [greedy(ids, name, 8) for name, ids in zip(names, PROMPTS, strict=False)]
    assert run(Engine(model, max_context=128), requests) == expected


def test_merged_adapters_are_the_base():
    model = adapted(tiny_mixture("mixtral"))
    model.set_adapter("first")
    answer = run(Engine(model, max_context=128), [greedy(PROMPTS[1], "first")])
    model.merge_adapter(["first"])
    engine = Engine(model, max_context=128)
    assert engine.adapters == () and run(engine, [greedy(PROMPTS[1])]) == answer


def test_long_prompts_in_parts_and_shared_beginnings(monkeypatch):
    """Contexts that new tokens continue: windows and sinks."""
    model = tiny_mixture("gpt_oss")
    beginning = prompt(7, 70)
    requests = [sampled(beginning + prompt(seed, 10)) for seed in range(2)]
    alone = [run_tokens(Engine(model, max_context=256), [request])[0] for request in requests]
    engine = Engine(model, max_context=256)
    assert_same(run_tokens(engine, requests), alone)
    engine = Engine(model, max_context=256, prefix_sharing=False)
    monkeypatch.setattr(engine, "_prefill_tokens", 48)
    assert_same(run_tokens(engine, requests), alone)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_experts_held_in_four_bits(family, double, captured, monkeypatch):
    pytest.importorskip("bitsandbytes")
    model = tiny_mixture(
        family, **({"num_experts": 12} if family == "qwen2_moe" else {"num_local_experts": 12})
    )
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            hold_in_four_bits(layer.mlp.experts, name, "nf4", double)
    expected = [stock(model, ids, 8) for ids in PROMPTS]
    requests = [greedy(ids, count=8) for ids in PROMPTS]
    # One row goes to fewer experts than there are, which alone are dequantised; several prompts to all.
    assert [run(Engine(model, max_context=128), [request])[0] for request in requests] == expected
    monkeypatch.undo()
    assert run(Engine(model, max_context=128), requests) == expected


def test_other_codes_are_seen(captured):
    pytest.importorskip("bitsandbytes")
    model = tiny_mixture("qwen2_moe")
    experts = model.model.layers[0].mlp.experts
    hold_in_four_bits(experts, "down_proj", "nf4", True)
    engine = Engine(model, max_context=128)
    request = sampled(PROMPTS[1])
    before = run(engine, [request])
    experts.down_proj_packed = experts.down_proj_packed.flip(0)
    after = run(engine, [request])
    assert before != after == run(Engine(model, max_context=128), [request])


def test_model_generate_goes_through_the_engine(caplog):
    model = adapted(tiny_mixture("qwen3_moe"))
    model.set_adapter("first")
    ids = torch.tensor([PROMPTS[1]])
    given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **given)
    FastLanguageModel.for_inference(model)
    assert torch.equal(model.generate(ids, **given), expected)
    assert through_engine(model.get_base_model()) and "own loop" not in caplog.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture as `base`, and `formal`, an adapter of its experts and attention."""
    path = tmp_path_factory.mktemp("mixture")
    save_tiny(path / "base", "gpt_oss", **MIXTURES["gpt_oss"])
    model = adapted(AutoModelForCausalLM.from_pretrained(path / "base"))
    model.save_pretrained(path, selected_adapters=["first"])
    (path / "first").rename(path / "formal")
    tiny_tokenizer().save_pretrained(path / "formal")
    return path


def stock_answer(folder, name: str) -> str:
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", attn_implementation="eager", experts_implementation="eager"
    )
    if name != "base":
        model = PeftModel.from_pretrained(model, folder / name)
    tokenizer = tiny_tokenizer()
    inputs = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_served_mixture(folder):
    def load():
        adapters = {"formal": str(folder / "formal")}
        return load_served(str(folder / "base"), adapters, max_batch=4, load_in_4bit=False, dtype="float32")

    with running(load) as server:
        for name in ("base", "formal"):
            _, _, answer = ask(server, model=name, messages=QUESTION, max_tokens=10, temperature=0)
            assert answer["choices"][0]["message"]["content"] == stock_answer(folder, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="chats in another precision on a GPU")
@pytest.mark.parametrize("name", ["base", "formal"])
def test_chatting_with_a_mixture(folder, name, capsys, caplog):
    command = ["chat", str(folder / name), "--prompt", QUESTION[0]["content"], "--max-new-tokens", "10"]
    assert main(command) == 0
    assert capsys.readouterr().out.rstrip("\n") == stock_answer(folder, name).rstrip("\n")
    assert "own loop" not in caplog.text


def test_sampling_in_any_company():
    model = tiny_mixture("mixtral")
    request = Request(PROMPTS[0], SamplingParams(max_new_tokens=10, temperature=1.3, seed=3, logprobs=2))
    alone = run_tokens(Engine(model, max_context=128), [request])
    together = run_tokens(Engine(model, max_context=128), [request, sampled(PROMPTS[2]), greedy(PROMPTS[1])])
    assert_same(together[:1], alone)


def test_a_mixture_loaded_in_four_bits_with_an_adapter_by_usual_names(tmp_path, captured):
    pytest.importorskip("bitsandbytes")
    save_tiny(tmp_path, "qwen2_moe", **MIXTURES["qwen2_moe"])
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path), load_in_4bit=True, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                generator = torch.Generator(parameter.device).manual_seed(len(name))
                parameter.normal_(0.0, 0.2, generator=generator)
    model.eval()
    expected = [stock(model.get_base_model(), ids, 6) for ids in PROMPTS]
    engine = Engine(model, max_batch=4, max_context=128)
    assert run(engine, [greedy(ids, "default", 6) for ids in PROMPTS]) == expected
    assert run(engine, [greedy(ids, None, 6) for ids in PROMPTS]) != expected
