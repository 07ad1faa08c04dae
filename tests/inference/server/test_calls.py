"""Bodies of calls: what is taken, and which field is named when something is wrong with it."""

from __future__ import annotations

import json

import pytest

from pronghorn.inference.server.calls import chat_call, completion_call
from pronghorn.inference.server.fields import parse_object
from pronghorn.inference.server.problems import CallProblem

HELLO = [{"role": "user", "content": "Hello"}]


def test_what_is_left_out():
    call = chat_call({"messages": HELLO})
    assert (call.model, call.choices, call.max_tokens, call.stop) == (None, 1, None, ())
    assert (call.stream, call.include_usage, call.logprobs) == (False, False, None)
    assert set(vars(call.chosen).values()) == {None}
    assert completion_call({"prompt": "a"}).max_tokens == 16


def test_everything_that_is_taken():
    call = chat_call(
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
            ],
            "model": "m",
            "n": 3,
            "max_tokens": 9,
            "max_completion_tokens": 5,
            "stop": "x",
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 2,
            "temperature": 0,
            "top_p": 1,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "seed": -1,
            "user": "someone",
            "store": False,
            "tools": None,
            "frequency_penalty": 0,
            "response_format": {"type": "text"},
        }
    )
    assert [message["role"] for message in call.messages] == ["system", "user", "assistant"]
    assert [message["content"] for message in call.messages] == ["Be brief.", "ab", "c"]
    assert (call.choices, call.max_tokens, call.stop, call.logprobs) == (3, 5, ("x",), 2)
    assert (call.chosen.temperature, call.chosen.top_k, call.chosen.seed) == (0.0, 5, -1)
    assert call.stream and call.include_usage


@pytest.mark.parametrize(
    "prompt,expected",
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_prompts(prompt, expected):
    assert completion_call({"prompt": prompt}).prompts == expected


@pytest.mark.parametrize(
    "field,value,named",
    [
        ("messages", [], "messages"),
        ("messages", "Hello", "messages"),
        ("messages", [1], "messages[0]"),
        ("messages", [{"role": "robot", "content": "a"}], "messages[0].role"),
        ("messages", [{"role": ["user"], "content": "a"}], "messages[0].role"),
        ("messages", [*HELLO, {"role": "user"}], "messages[1].content"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ("messages", [{"role": "user", "content": "a", "colour": 1}], "messages[0].colour"),
        ("messages", [{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ("model", 3, "model"),
        ("n", 0, "n"),
        ("n", 1.5, "n"),
        ("n", True, "n"),
        ("n", 129, "n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", 10**30, "max_tokens"),
        ("max_completion_tokens", "9", "max_completion_tokens"),
        ("temperature", -0.1, "temperature"),
        ("temperature", 2.1, "temperature"),
        ("temperature", "hot", "temperature"),
        ("temperature", 10**400, "temperature"),
        ("top_p", 0, "top_p"),
        ("top_p", 1.1, "top_p"),
        ("top_k", -1, "top_k"),
        ("seed", 1 << 63, "seed"),
        ("stop", ["a"] * 17, "stop"),
        ("stop", [""], "stop"),
        ("stop", "a" * 501, "stop"),
        ("stop", [1], "stop"),
        ("stream", "yes", "stream"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("stream_options", [], "stream_options"),
        ("stream_options", {"include_use": True}, "stream_options.include_use"),
        ("logprobs", 3, "logprobs"),
        ("top_logprobs", 3, "top_logprobs"),
        ("tools", [{"type": "function"}], "tools"),
        ("response_format", {"type": "json_object"}, "response_format"),
        ("logit_bias", {"5": 1}, "logit_bias"),
        ("presence_penalty", 0.5, "presence_penalty"),
        ("temprature", 1, "temprature"),
        ("chat_template_kwargs", [], "chat_template_kwargs"),
        ("chat_template_kwargs", {"chat_template": "x"}, "chat_template_kwargs.chat_template"),
        ("chat_template_kwargs", {"tokenize": False}, "chat_template_kwargs.tokenize"),
        ("chat_template_kwargs", {"words": ["a"]}, "chat_template_kwargs.words"),
    ],
)
def test_the_field_that_is_wrong_is_named(field, value, named):
    with pytest.raises(CallProblem) as found:
        chat_call({"messages": HELLO, field: value})
    assert (found.value.status, found.value.param) == (400, named)
    assert named in found.value.message


@pytest.mark.parametrize(
    "field,value",
    [
        ("prompt", None),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 1]),
        ("prompt", [True]),
        ("prompt", {}),
        ("prompt", ["a"] * 129),
        ("logprobs", 21),
        ("logprobs", True),
        ("echo", True),
        ("suffix", "x"),
        ("best_of", 2),
        ("messages", HELLO),
    ],
)
def test_the_field_of_a_completion_that_is_wrong_is_named(field, value):
    with pytest.raises(CallProblem) as found:
        completion_call({"prompt": "a", field: value})
    assert (found.value.status, found.value.param) == (400, field)


def test_a_misspelt_field_gets_a_suggestion():
    with pytest.raises(CallProblem, match="did you mean 'temperature'"):
        chat_call({"messages": HELLO, "temprature": 1})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"seed": ' + b"1" * 5000 + b"}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["empty", "cut", "list", "null", "latin", "nan", "digits", "deep"],
)
def test_bodies_that_are_no_objects(body):
    with pytest.raises(CallProblem) as found:
        parse_object(body)
    assert found.value.status == 400
    json.dumps(found.value.as_dict())
