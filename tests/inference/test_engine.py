"""The engine's answers: those of stock greedy generation, in any company and however scarce blocks are."""

from __future__ import annotations

import random

import pytest
import torch

from pronghorn.errors import AdapterUnknown, EngineRefused, RequestTooLong, SamplingInvalid
from pronghorn.inference import engine as engine_module
from pronghorn.inference.captured import CapturedRunner
from pronghorn.inference.engine import Engine
from pronghorn.inference.requests import Request, SamplingParams, Token
from tests.tiny import FAMILIES, tiny_model

NEW = 24


def prompt(seed: int, length: int) -> tuple[int, ...]:
    numbers = random.Random(seed)
    return tuple(numbers.randrange(3, 320) for _ in range(length))


PROMPTS = [prompt(seed, length) for seed, length in enumerate((5, 63, 64, 65, 130))]


def stock(model, ids, count=NEW, **arguments) -> list[int]:
    out = type(model).generate(
        model, torch.tensor([ids], device=model.device), max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=0, **arguments,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


def recorded_steps_ask_nothing(monkeypatch):
    """From here on a step that would be recorded fails where the host waits for a number of the device."""
    compute = CapturedRunner.compute

    def refused(*arguments):
        raise AssertionError("a recorded step asks the device")

    def asking_nothing(runner, size):
        with monkeypatch.context() as asked:
            for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu"):
                asked.setattr(torch.Tensor, name, refused)
            return compute(runner, size)

    monkeypatch.setattr(CapturedRunner, "compute", asking_nothing)


def run_tokens(engine, requests, arrivals=None) -> list[list[Token]]:
    """The tokens of each request; request i is submitted before step arrivals[i]."""
    arrivals = arrivals or [0] * len(requests)
    answers: dict[int, list[Token]] = {}
    numbers: dict[int, int] = {}
    for step in range(10_000):
        for i, request in enumerate(requests):
            if arrivals[i] == step:
                numbers[i] = engine.submit(request)
                answers[numbers[i]] = []
        if not engine.has_work and len(numbers) == len(requests):
            break
        for event in engine.step():
            answers[event.request_id] += event.tokens
    assert engine.free_blocks == engine.total_blocks and not engine.running and not engine.waiting
    return [answers[numbers[i]] for i in range(len(requests))]


def run(engine, requests, arrivals=None) -> list[list[int]]:
    return [[token.id for token in answer] for answer in run_tokens(engine, requests, arrivals)]


def assert_same(found: list[list[Token]], expected: list[list[Token]]) -> None:
    """The same tokens, with log-probabilities that differ by the order of fp32 sums alone."""
    for ours, theirs in zip(found, expected, strict=True):
        assert [token.id for token in ours] == [token.id for token in theirs]
        logprobs = [torch.tensor([token.logprob for token in answer]) for answer in (ours, theirs)]
        torch.testing.assert_close(*logprobs, atol=1e-5, rtol=1e-5)


def greedy(ids, adapter=None, count=NEW) -> Request:
    return Request(ids, SamplingParams(max_new_tokens=count), adapter)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(model):
    return [stock(model, ids) for ids in PROMPTS]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_answers_are_those_of_stock_generate(family):
    model = tiny_model(family, seed=1)
    found = run(Engine(model, max_batch=8, max_context=256), [greedy(ids) for ids in PROMPTS])
    assert found == [stock(model, ids) for ids in PROMPTS]


@pytest.mark.parametrize("config", [{"sliding_window": 40}], ids=["window"])
def test_a_sliding_window(config):
    model = tiny_model("mistral", **config)
    assert run(Engine(model, max_context=256), [greedy(ids) for ids in PROMPTS]) == [
        stock(model, ids) for ids in PROMPTS
    ]


@pytest.fixture(scope="module")
def alone(model):
    """Sampled answers with log-probabilities, each from an engine of its own."""
    return [run_tokens(Engine(model, max_context=256), [sampled(ids)])[0] for ids in PROMPTS]


def sampled(ids, adapter=None, seed=11) -> Request:
    """Answers that do not settle on one token, as greedy ones of random weights do."""
    return Request(
        ids, SamplingParams(max_new_tokens=NEW, temperature=1.5, top_k=40, seed=seed, logprobs=0), adapter
    )


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("blocks", [4, 6, 64])
def test_neither_arrivals_nor_few_blocks_change_an_answer(model, alone, sharing, blocks):
    numbers = random.Random(blocks)
    engine = Engine(model, max_batch=3, max_context=256, cache_tokens=blocks * 64, prefix_sharing=sharing)
    arrivals = [numbers.randrange(30) for _ in PROMPTS]
    assert_same(run_tokens(engine, [sampled(ids) for ids in PROMPTS], arrivals), alone)


def test_blocks_run_out_and_the_last_one_waits(model):
    """Two requests of 60 tokens begin in a block each and grow into a second and a third; there are four."""
    ids = [prompt(seed, 60) for seed in (1, 2)]
    engine = Engine(model, max_batch=2, max_context=160, cache_tokens=4 * 64)
    for one in ids:
        engine.submit(greedy(one, count=90))
    preempted = 0
    answers: dict[int, list[int]] = {0: [], 1: []}
    while engine.has_work:
        before = engine.running
        for event in engine.step():
            answers[event.request_id] += [token.id for token in event.tokens]
        preempted += before == 2 and engine.waiting == 1
    assert preempted
    assert list(answers.values()) == [stock(model, one, 90) for one in ids]


def test_long_prompts_are_computed_in_parts(model, alone, monkeypatch):
    engine = Engine(model, max_context=256)
    monkeypatch.setattr(engine, "_prefill_tokens", 48)
    assert_same(run_tokens(engine, [sampled(ids) for ids in PROMPTS]), alone)


def test_a_shared_beginning_is_computed_once(model):
    beginning = prompt(7, 150)
    requests = [sampled(beginning + prompt(seed, 10)) for seed in range(3)]
    alone = [run_tokens(Engine(model, max_context=256), [request])[0] for request in requests]
    engine = Engine(model, max_context=256)
    computed = []
    prefill = engine._runner.prefill

    def counting(parts):
        computed.append(sum(end - sequence.cached for sequence, end in parts))
        return prefill(parts)

    engine._runner.prefill = counting
    assert_same(run_tokens(engine, requests), alone)
    # The first computes all 160 tokens, the other two what follows the two full blocks that it left.
    assert sum(computed) == 160 + 2 * (160 - 128)


def test_trained_weights_are_seen_and_the_cache_forgets(model):
    model = tiny_model("llama", seed=3)
    engine = Engine(model, max_context=256)
    ids = prompt(0, 100)
    before = run(engine, [greedy(ids)])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1.0)
    after = run(engine, [greedy(ids)])
    assert after == [stock(model, ids)] and after != before


def test_stops_and_lengths(model, expected):
    stop = expected[0][3]
    at = expected[0].index(stop) + 1
    engine = Engine(model, max_context=256)
    number = engine.submit(Request(PROMPTS[0], SamplingParams(max_new_tokens=NEW, stop_token_ids=(stop,))))
    other = engine.submit(greedy(PROMPTS[1], count=3))
    events = []
    while engine.has_work:
        events += engine.step()
    last = {event.request_id: event.finish_reason for event in events}
    assert last == {number: "stop", other: "length"}
    assert [t.id for e in events if e.request_id == number for t in e.tokens] == expected[0][:at]
    assert sum(event.finish_reason is not None for event in events) == 2


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_cancelling_frees_the_blocks_at_once(model, expected, steps):
    engine = Engine(model, max_context=256)
    first, second = engine.submit(greedy(PROMPTS[4])), engine.submit(greedy(PROMPTS[0]))
    answer = []
    for _ in range(steps):
        answer += [t.id for e in engine.step() if e.request_id == second for t in e.tokens]
    free = engine.free_blocks
    engine.cancel(first)
    assert engine.free_blocks >= free + (3 if steps else 0)
    reasons = {}
    while engine.has_work:
        for event in engine.step():
            reasons[event.request_id] = event.finish_reason
            answer += [t.id for t in event.tokens if event.request_id == second]
    assert reasons == {first: "cancelled", second: "length"} and answer == expected[0]
    engine.cancel(first)
    assert not engine.has_work


def test_logprobs_are_the_models_own(model):
    sampling = SamplingParams(max_new_tokens=4, temperature=0.7, seed=5, logprobs=3)
    engine = Engine(model, max_context=256)
    engine.submit(Request(PROMPTS[1], sampling))
    ids = list(PROMPTS[1])
    while engine.has_work:
        for event in engine.step():
            for token in event.tokens:
                with torch.no_grad():
                    logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                best = logprobs.topk(3)
                assert [i for i, _ in token.top] == best.indices.tolist()
                # fp32 logits of another order of sums
                torch.testing.assert_close(
                    torch.tensor([token.logprob, *(p for _, p in token.top)]),
                    torch.stack([logprobs[token.id], *best.values]),
                    atol=1e-5, rtol=1e-5,
                )  # fmt: skip
                ids.append(token.id)


def test_a_seed_repeats_an_answer_in_any_company(model, alone):
    company = [sampled(PROMPTS[1], seed=2), greedy(PROMPTS[3]), sampled(PROMPTS[1]), sampled(PROMPTS[1])]
    together = run(Engine(model, max_context=256, cache_tokens=9 * 64), company, [0, 2, 5, 1])
    assert together[2] == together[3] == [token.id for token in alone[1]] != together[0]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2.0},
        {"repetition_penalty": 0.0}, {"max_new_tokens": 0}, {"temperature": float("nan")}, {"logprobs": -1},
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(model, sampling):
    with pytest.raises(SamplingInvalid, match=next(iter(sampling))):
        Engine(model, max_context=64).submit(Request((1, 2), SamplingParams(**sampling)))


def test_requests_that_cannot_be_answered(model):
    engine = Engine(model, max_context=100)
    with pytest.raises(RequestTooLong, match="100 tokens"):
        engine.submit(greedy(prompt(0, 90)))
    with pytest.raises(SamplingInvalid, match="no tokens"):
        engine.submit(greedy(()))
    with pytest.raises(SamplingInvalid, match="token 320"):
        engine.submit(greedy((5, 320)))
    with pytest.raises(AdapterUnknown, match="legal"):
        engine.submit(greedy((5,), "legal"))
    assert not engine.has_work


def test_angles_that_move_beyond_the_original_length():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=160)
    expected = [stock(model, ids) for ids in PROMPTS]
    # The module keeps the frequencies of a long context until it sees a shorter one than the original length.
    model(input_ids=torch.tensor([prompt(0, 200)]))
    assert run(Engine(model, max_context=160), [greedy(ids) for ids in PROMPTS]) == expected
    with pytest.raises(EngineRefused, match="beyond 160 tokens"):
        Engine(model, max_context=161)


def with_long_rope():
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 72,
        "short_factor": [1.0 + 0.2 * i for i in range(8)], "long_factor": [2.0 + 1.5 * i for i in range(8)],
    }  # fmt: skip
    return tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=72, seed=4)


@pytest.mark.parametrize("recorded", [False, True])
def test_contexts_that_outgrow_their_angles(recorded, monkeypatch):
    """Of 72 tokens: some answers begin and end before it, some behind it, and the third and fourth pass it."""
    if recorded:
        monkeypatch.setattr(engine_module, "_runner", CapturedRunner)
    model = with_long_rope()
    prompts = [*PROMPTS, PROMPTS[4][:72], PROMPTS[4][:73]]
    expected = [stock(model, ids) for ids in prompts]
    engine = Engine(model, max_batch=8, max_context=256)
    assert run(engine, [greedy(ids) for ids in prompts]) == expected
    # What is left in the cache serves contexts of its own kind alone.
    assert [run(engine, [greedy(ids)])[0] for ids in reversed(prompts)] == expected[::-1]
    few = Engine(model, max_batch=3, max_context=256, cache_tokens=4 * 64)
    monkeypatch.setattr(few, "_prefill_tokens", 48)
    assert run(few, [greedy(ids) for ids in prompts], [0, 1, 2, 5, 9, 9, 20]) == expected
    assert run(Engine(model, max_context=72), [greedy(PROMPTS[0])]) == expected[:1]


def test_layers_that_rotate_differently():
    """Gemma 3's windowed layers have a base of their own."""
    model = tiny_model("gemma3_text", layer_types=["sliding_attention", "full_attention"], sliding_window=40)
    found = run(Engine(model, max_context=256), [greedy(ids) for ids in PROMPTS])
    assert found == [stock(model, ids) for ids in PROMPTS]


def test_queries_that_grow_are_refused_where_they_do():
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.5,
    }  # fmt: skip
    model = tiny_model("ministral3", rope_parameters=rope)
    with pytest.raises(EngineRefused, match="queries grow beyond 64 tokens"):
        Engine(model, max_context=65)
    assert run(Engine(model, max_context=64), [greedy(PROMPTS[0])]) == [stock(model, PROMPTS[0])]


def test_a_model_with_hooks_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.register_forward_hook(lambda *args: None)
    with pytest.raises(EngineRefused, match=r"layers\.1\.self_attn"):
        Engine(model, max_context=64)
