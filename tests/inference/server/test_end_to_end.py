"""The real engine behind the server: a tiny model with two adapters answers as Transformers and PEFT do."""

from __future__ import annotations

import threading

import pytest
import torch

from pronghorn.inference.server.loading import load_served, usual_choice
from tests.inference.adapters import save_base_and_adapters, stock_answer, stock_model
from tests.inference.server.running import ask, call, connected, raw_request, running, until
from tests.tiny import tiny_tokenizer

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What does it eat?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base_and_adapters(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder):
    adapters = {name: str(folder / name) for name in ("formal", "casual.v2")}

    def load():
        return load_served(str(folder / "base"), adapters, max_batch=4, load_in_4bit=False, dtype="float32")

    with running(load) as found:
        yield found


@pytest.mark.parametrize("name", ["base", "formal", "casual.v2"])
def test_answers_are_those_of_transformers_and_peft(server, folder, name):
    _, _, answer = ask(server, model=name, messages=QUESTION, max_tokens=12, temperature=0)
    assert answer["choices"][0]["message"]["content"] == stock_answer(folder, name, QUESTION, 12)


def test_adapters_answer_side_by_side(server, folder):
    names = ["base", "formal", "casual.v2", "formal"]
    answers: dict[int, str] = {}

    def one(i: int) -> None:
        _, _, answer = ask(server, model=names[i], messages=QUESTION, max_tokens=12, temperature=0)
        answers[i] = answer["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {i: stock_answer(folder, name, QUESTION, 12) for i, name in enumerate(names)}
    assert len(set(answers.values())) == 3


def test_a_seed_repeats_an_answer(server):
    def content(**fields):
        found = ask(server, messages=QUESTION, max_tokens=12, temperature=1.5, **fields)[2]
        return [choice["message"]["content"] for choice in found["choices"]]

    assert content(seed=5, n=2) == content(seed=5, n=2)
    assert content(seed=5, n=2)[1] == content(seed=6)[0]
    assert content(seed=5) != content(seed=7)
    assert content() != content()


def test_log_probabilities_are_the_models(server, folder):
    _, _, answer = ask(
        server, messages=QUESTION, max_tokens=3, temperature=0, logprobs=True, top_logprobs=320
    )
    assert answer["error"]["param"] == "top_logprobs"
    _, _, answer = ask(server, messages=QUESTION, max_tokens=3, temperature=0, logprobs=True, top_logprobs=20)
    model = stock_model(folder, "base")
    ids = tiny_tokenizer().apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        logprobs = model(ids).logits[0, -1].log_softmax(-1)
    told = answer["choices"][0]["logprobs"]["content"][0]
    assert told["logprob"] == pytest.approx(float(logprobs.max()), abs=1e-4)
    assert [t["logprob"] for t in told["top_logprobs"]] == pytest.approx(
        logprobs.topk(20).values.tolist(), abs=1e-4
    )


def test_a_client_that_goes_away_frees_its_blocks(server):
    with connected(server) as client:
        body = {"messages": QUESTION, "stream": True, "max_tokens": 200, "n": 3, "stop": ["nowhere"]}
        client.sendall(raw_request(CHAT, body))
        until(lambda: server.worker.counts.free_blocks < server.worker.counts.total_blocks)
    until(lambda: server.worker.counts.free_blocks == server.worker.counts.total_blocks)
    assert server.worker.counts.running == 0


def test_what_does_not_fit(server):
    status, _, answer = ask(server, messages=QUESTION, max_tokens=250)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_models(server):
    data = call(server, "GET", "/v1/models")[2]["data"]
    assert [(item["id"], item.get("parent")) for item in data] == [
        ("base", None),
        ("formal", "base"),
        ("casual.v2", "base"),
    ]


def test_a_generation_config_that_draws_is_the_usual_choice():
    class Model:
        class generation_config:
            do_sample, temperature, top_p, top_k = True, 0.7, 0.8, 20

    chosen = usual_choice(Model)
    assert (chosen.temperature, chosen.top_p, chosen.top_k, chosen.seed) == (0.7, 0.8, 20, None)
    Model.generation_config.do_sample = False
    assert usual_choice(Model).temperature is None
