"""Calls of the OpenAI API: their JSON bodies as checked values."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

from pronghorn.inference.generate import Messages
from pronghorn.inference.server.fields import Fields

MOST_CHOICES = 128
MOST_STOPS = 16
MOST_STOP_LETTERS = 500
MOST_LOGPROBS = 20
#: Longer than any context. The engine says what this model's is.
MOST_TOKENS = 1 << 24
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Chosen:
    """How tokens are chosen; None leaves it to the model's generation config."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


NOTHING_CHOSEN = Chosen()


@dataclass(frozen=True)
class Call:
    """What both kinds of calls ask for.

    Args:
        model: a name of /v1/models; None takes the first.
        choices: answers to each prompt.
        max_tokens: None goes on to the end of the context.
        stop: the answer ends before the first of these.
        logprobs: None, or how many alternatives are told for each token.
        include_usage: a stream ends with the counts of tokens.
    """

    model: str | None
    choices: int
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: int | None
    chosen: Chosen


@dataclass(frozen=True)
class ChatCall(Call):
    """`template` is for the chat template, such as {"enable_thinking": false}."""

    messages: Messages
    template: dict[str, Any]


@dataclass(frozen=True)
class CompletionCall(Call):
    """Each prompt is a text or tokens."""

    prompts: tuple[str | tuple[int, ...], ...]


def chat_call(body: dict[str, Any]) -> ChatCall:
    """The body of POST /v1/chat/completions.

    Raises:
        CallProblem: 400, naming the field.
    """
    fields = Fields(body)
    messages = _messages(fields)
    tokens = fields.whole("max_completion_tokens", 1, MOST_TOKENS)
    older_name = fields.whole("max_tokens", 1, MOST_TOKENS)
    wanted, top = fields.switch("logprobs"), fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if top is not None and not wanted:
        raise fields.wrong("top_logprobs", "needs 'logprobs': true")
    fields.only("tools", lambda value: value == [], "is not supported: models are not asked to call tools")
    fields.only("tool_choice", lambda value: value in ("none", "auto"), "is not supported")
    fields.only(
        "response_format",
        lambda value: value == {"type": "text"},
        "is not supported: answers are free text",
    )
    fields.only("modalities", lambda value: value == ["text"], 'must be ["text"]')
    call = ChatCall(
        **_common(fields),
        max_tokens=older_name if tokens is None else tokens,
        logprobs=(top or 0) if wanted else None,
        messages=messages,
        template=_template(fields),
    )
    fields.nothing_left()
    return call


def completion_call(body: dict[str, Any]) -> CompletionCall:
    """The body of POST /v1/completions.

    Raises:
        CallProblem: 400, naming the field.
    """
    fields = Fields(body)
    prompts = _prompts(fields)
    tokens = fields.whole("max_tokens", 1, MOST_TOKENS)
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS)
    fields.only("echo", lambda value: value is False, "is not supported: add the prompt yourself")
    fields.only("suffix", lambda value: value == "", "is not supported")
    common = _common(fields)
    fields.only("best_of", lambda value: value == common["choices"], "must be what 'n' is")
    if len(prompts) * common["choices"] > MOST_CHOICES:
        raise fields.wrong("prompt", f"times 'n' asks for more than {MOST_CHOICES} answers")
    call = CompletionCall(
        **common,
        max_tokens=16 if tokens is None else tokens,  # as OpenAI's
        logprobs=logprobs,
        prompts=prompts,
    )
    fields.nothing_left()
    return call


def _common(fields: Fields) -> dict[str, Any]:
    stream = fields.switch("stream")
    options = fields.inner("stream_options")
    include_usage = options.switch("include_usage")
    options.only("include_obfuscation", lambda value: value is False, "is not supported")
    options.nothing_left()
    if include_usage and not stream:
        raise fields.wrong("stream_options", "needs 'stream': true")
    for penalty in ("frequency_penalty", "presence_penalty"):
        fields.only(penalty, lambda value: value == 0, "is not supported: use 'repetition_penalty'")
    fields.only("logit_bias", lambda value: value == {}, "is not supported")
    seed = fields.whole("seed", -(1 << 63), (1 << 63) - 1)
    return {
        "model": fields.text("model"),
        "choices": fields.whole("n", 1, MOST_CHOICES) or 1,
        "stop": _stops(fields),
        "stream": stream,
        "include_usage": include_usage,
        "chosen": Chosen(
            temperature=fields.number("temperature", 0, 2),
            top_p=_above_zero(fields, "top_p", 1),
            top_k=fields.whole("top_k", 0, MOST_TOKENS),
            min_p=fields.number("min_p", 0, 1),
            repetition_penalty=_above_zero(fields, "repetition_penalty", 10),
            seed=seed,
        ),
    }


def _above_zero(fields: Fields, name: str, high: float) -> float | None:
    value = fields.number(name, 0, high)
    if value == 0:
        raise fields.wrong(name, "must be above 0")
    return value


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [] if value is None else value if isinstance(value, list) else [value]
    if len(stops) > MOST_STOPS:
        raise fields.wrong("stop", f"must be at most {MOST_STOPS} strings")
    texts = tuple(fields.checked_text("stop", stop) for stop in stops)
    if not all(1 <= len(text) <= MOST_STOP_LETTERS for text in texts):
        raise fields.wrong("stop", f"must be strings of 1 to {MOST_STOP_LETTERS} letters")
    return texts


def _template(fields: Fields) -> dict[str, Any]:
    """Values for the chat template; not what else Transformers would take, such as another template."""
    from transformers import PreTrainedTokenizerBase

    given = fields.take("chat_template_kwargs")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise fields.wrong("chat_template_kwargs", "must be an object")
    taken = signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name, value in given.items():
        if name in taken or name == "messages" or not isinstance(value, bool | int | float | str):
            raise fields.wrong(
                f"chat_template_kwargs.{name}", "must be a truth value, number or text for the template"
            )
    return given


def _messages(fields: Fields) -> Messages:
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        raise fields.wrong("messages", "must be a list of at least one message")
    return [_message(fields, f"messages[{i}]", message) for i, message in enumerate(value)]


def _message(fields: Fields, name: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise fields.wrong(name, "must be an object with 'role' and 'content'")
    inner = Fields(message, f"{name}.")
    role = inner.take("role")
    if not isinstance(role, str) or role not in ROLES:
        raise inner.wrong("role", f"must be one of {', '.join(ROLES)}")
    content = inner.take("content")
    if isinstance(content, list):
        content = "".join(_text_part(inner, f"content[{i}]", part) for i, part in enumerate(content))
    text = inner.checked_text("content", content)
    inner.take("name")  # templates have no place for it
    # What OpenAI's client sends back of an earlier answer.
    for field in ("refusal", "audio", "function_call", "tool_calls", "annotations"):
        inner.only(field, lambda value: value == [], "is not supported")
    inner.nothing_left()
    return {"role": ROLES[role], "content": text}


def _text_part(fields: Fields, name: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise fields.wrong(name, 'must be {"type": "text", "text": ...}: this model reads text only')
    return fields.checked_text(f"{name}.text", part.get("text"))


def _prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several; each a text or a list of tokens."""
    value = fields.take("prompt")
    if isinstance(value, str):
        return (fields.checked_text("prompt", value),)
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(fields.checked_text(f"prompt[{i}]", item) for i, item in enumerate(value))
        if all(isinstance(item, list) and item and all(type(t) is int for t in item) for item in value):
            return tuple(tuple(item) for item in value)
    raise fields.wrong("prompt", "must be a string, a list of strings, or a list of (lists of) tokens")
