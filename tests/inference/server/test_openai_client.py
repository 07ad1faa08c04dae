"""OpenAI's own client against the server, with an engine that says what it is told to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

openai = pytest.importorskip("openai")

from pronghorn.inference.variants import Variant  # noqa: E402
from tests.inference.server.fakes import FakeEngine, saying, served_model  # noqa: E402
from tests.inference.server.running import running  # noqa: E402
from tests.tiny import tiny_tokenizer  # noqa: E402

TEXT = "Grass, sagebrush & «cactus» 🌵.\n\nThat is all."
QUESTION = [{"role": "user", "content": "What does it eat?"}]


@pytest.fixture(scope="module")
def server():
    engine = FakeEngine(saying(TEXT), pause=0.001)
    model, tokenizer = served_model(), tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if enable_thinking is not defined %}{{ raise_exception('no') }}{% endif %}"
        "thinking: {{ enable_thinking }}"
    )
    thinker = Variant("thinker", "adapter1", tokenizer, ())
    model = replace(model, variants={**model.variants, "thinker": thinker})
    with running(lambda: (engine, model), token="secret") as found:
        found.engine = engine
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1",
        api_key="secret",
        max_retries=0,
    ) as found:
        yield found


def test_models(client):
    assert [(m.id, m.owned_by) for m in client.models.list()] == [
        ("tiny", "pronghorn"),
        ("formal", "pronghorn"),
        ("thinker", "pronghorn"),
    ]
    assert client.models.retrieve("formal").parent == "tiny"
    with pytest.raises(openai.NotFoundError, match="did you mean 'formal'"):
        client.models.retrieve("formel")


def test_a_chat(client, server):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert answer.model == "tiny" and answer.object == "chat.completion"
    request = server.engine.submitted[-1]
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(request.prompt_ids) == (
        "<|im_start|>user\nWhat does it eat?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer.usage.prompt_tokens == len(request.prompt_ids)
    assert answer.usage.completion_tokens == len(tokenizer(TEXT)["input_ids"]) + 1  # and EOS
    assert request.sampling.max_new_tokens == 256 - len(request.prompt_ids)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (1.0, 1.0, 0)
    assert request.adapter is None


def test_a_streamed_chat(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
    )
    *told, last = chunks
    pieces = [chunk.choices[0].delta.content for chunk in told]
    assert "".join(pieces) == TEXT
    assert len(pieces) > 20 and not any("\ufffd" in piece for piece in pieces)
    assert [chunk.choices[0].delta.role for chunk in told] == ["assistant"] + [None] * (len(told) - 1)
    assert [chunk.choices[0].finish_reason for chunk in told] == [None] * (len(told) - 1) + ["stop"]
    assert last.choices == [] and last.usage.completion_tokens > 20
    assert all(chunk.usage is None for chunk in told)
    assert len({chunk.id for chunk in chunks}) == 1


def test_sampling_reaches_the_engine(client, server):
    client.chat.completions.create(
        model="formal",
        messages=QUESTION,
        n=2,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        extra_body={"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1},
    )
    first, second = server.engine.submitted[-2:]
    assert (first.adapter, second.adapter) == ("adapter0", "adapter0")
    sampling = first.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.9)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (40, 0.05, 1.1)
    assert (sampling.seed, second.sampling.seed) == (11, 12)
    assert sampling.logprobs is None


def test_several_answers(client):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, n=3, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage.completion_tokens == 15
    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(
        model="tiny", messages=QUESTION, n=3, max_tokens=5, stream=True
    ):
        choice = chunk.choices[0]
        streamed[choice.index] = streamed.get(choice.index, "") + choice.delta.content
    assert streamed == {choice.index: choice.message.content for choice in answer.choices}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "stop,expected",
    [("\n\n", TEXT.split("\n\n")[0]), ([" 🌵", "xyz"], "Grass, sagebrush & «cactus»"), ("nowhere", TEXT)],
)
def test_stop_strings(client, server, stop, expected, stream):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, stop=stop, stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, finish) == (expected, "stop")


def test_what_the_chat_template_is_told(client, server):
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    client.chat.completions.create(model="thinker", messages=QUESTION, extra_body=extra)
    assert tiny_tokenizer().decode(server.engine.submitted[-1].prompt_ids) == "thinking: False"
    with pytest.raises(openai.BadRequestError, match="the chat template refuses the messages: no"):
        client.chat.completions.create(model="thinker", messages=QUESTION)


def test_a_special_token_as_a_stop_string(client, server):
    client.chat.completions.create(model="tiny", messages=QUESTION, stop=["<|im_end|>", "word"])
    tokenizer = tiny_tokenizer()
    assert server.engine.submitted[-1].sampling.stop_token_ids == (
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )


def test_log_probabilities_of_a_chat(client):
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, logprobs=True, top_logprobs=2, stop="\n\n"
    )
    told = answer.choices[0].logprobs.content
    text = TEXT.split("\n\n")[0]
    assert b"".join(bytes(token.bytes) for token in told).decode() == text
    assert {token.logprob for token in told} == {-0.5}
    assert [alternative.logprob for alternative in told[0].top_logprobs] == [-0.5, -1.5]
    assert told[0].top_logprobs[0].token == told[0].token
    streamed = [
        token
        for chunk in client.chat.completions.create(
            model="tiny", messages=QUESTION, logprobs=True, top_logprobs=2, stop="\n\n", stream=True
        )
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == told


def test_completions(client, server):
    answer = client.completions.create(model="tiny", prompt="The pronghorn eats", max_tokens=200)
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert server.engine.submitted[-1].prompt_ids == tuple(
        tiny_tokenizer()("The pronghorn eats")["input_ids"]
    )
    streamed = client.completions.create(model="tiny", prompt="a", max_tokens=200, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == TEXT


def test_several_prompts(client, server):
    answer = client.completions.create(model="tiny", prompt=[[5, 6], [7, 8, 9]], n=2, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [request.prompt_ids for request in server.engine.submitted[-4:]] == [
        (5, 6),
        (5, 6),
        (7, 8, 9),
        (7, 8, 9),
    ]
    assert answer.usage.prompt_tokens == 5


def test_log_probabilities_of_a_completion(client):
    told = client.completions.create(model="tiny", prompt="a", logprobs=1, max_tokens=6).choices[0].logprobs
    assert "".join(told.tokens) == TEXT[: len("".join(told.tokens))]
    assert told.text_offset[:2] == [0, len(told.tokens[0])]
    assert told.token_logprobs == [-0.5] * 6
    assert math.isclose(next(iter(told.top_logprobs[0].values())), -0.5)


@pytest.mark.parametrize(
    "changes,error,param,code",
    [
        ({"model": "other"}, "NotFoundError", "model", "model_not_found"),
        ({"temperature": 3}, "BadRequestError", "temperature", "invalid_value"),
        ({"max_tokens": 1000}, "BadRequestError", "messages", "context_length_exceeded"),
        (
            {"messages": [{"role": "user", "content": "long " * 300}]},
            "BadRequestError",
            "messages",
            "context_length_exceeded",
        ),
    ],
)
def test_errors_are_the_clients_own(client, changes, error, param, code):
    with pytest.raises(getattr(openai, error)) as found:
        client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, **changes})
    assert (found.value.param, found.value.code) == (param, code)
    assert found.value.type == "invalid_request_error"


def test_unknown_tokens_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="not from 0 to 319"):
        client.completions.create(model="tiny", prompt=[320])


def test_a_wrong_token(server):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="guess", max_retries=0
    ) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
