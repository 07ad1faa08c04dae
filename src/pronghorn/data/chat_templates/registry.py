"""The chat formats that model makers have published: a Jinja body each, and the tokens it counts on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from pronghorn.errors import UnknownArgument, nearest

_PLAIN_ROLES = ("system", "user", "assistant")
_QWEN_TOOLS = (*_PLAIN_ROLES, "tool")


@dataclass(frozen=True)
class ChatTemplate:
    """One format.

    Args:
        file: the Jinja body in this folder. It reads `messages`, `begin` (BOS, or nothing) and `stop`, and marks what
            the assistant writes with ``{% generation %}``: all from the end of the generation prompt to the stop.
        about: which models speak it.
        stop: the token that ends an answer; None is the tokenizer's EOS.
        markers: further tokens it writes. They must be whole tokens of the tokenizer.
        begins_with_bos: BOS belongs to the format. Otherwise it is written for tokenizers that put one before any text.
        system: the system message of a conversation without one; None is none.
        roles: roles it has a place for.
        tools: it has a place for tool definitions and tool calls.
        settings: further variables of the body, as Jinja expressions.
    """

    name: str
    file: str
    about: str
    aliases: tuple[str, ...] = ()
    stop: str | None = None
    markers: tuple[str, ...] = ()
    begins_with_bos: bool = False
    system: str | None = None
    roles: tuple[str, ...] = _PLAIN_ROLES
    tools: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> str:
        return _read(self.file)


@cache
def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8").strip("\n")


def common_macros() -> str:
    """Macros that every body may use."""
    return _read("common.jinja")


_LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>")
_IM = ("<|im_start|>",)
_GEMMA = ("<start_of_turn>",)


def _llama_3_1(name: str, *aliases: str) -> ChatTemplate:
    return ChatTemplate(
        name,
        "llama-3.1.jinja",
        f"{name.replace('llama', 'Llama')} Instruct; the date is the one its makers wrote, not today's",
        aliases=aliases,
        stop="<|eot_id|>",
        markers=_LLAMA_3,
        begins_with_bos=True,
        roles=(*_PLAIN_ROLES, "tool", "ipython"),
        tools=True,
    )


def _gemma(name: str, *aliases: str) -> ChatTemplate:
    return ChatTemplate(
        name,
        "gemma.jinja",
        f"{name.replace('gemma', 'Gemma')} it; a system message opens the first question",
        aliases=aliases,
        stop="<end_of_turn>",
        markers=_GEMMA,
        begins_with_bos=True,
    )


def _mistral(
    name: str, about: str, *aliases: str, markers: tuple[str, ...] = (), **settings: str
) -> ChatTemplate:
    return ChatTemplate(
        name,
        "mistral.jinja",
        about,
        aliases=aliases,
        markers=markers,
        begins_with_bos=True,
        settings={"space": "' '", "system_first": "false", **settings},
    )


_ALL = (
    ChatTemplate(
        "chatml",
        "chatml.jinja",
        "ChatML: Qwen, Yi, SmolLM2, Hermes and many fine-tunes",
        stop="<|im_end|>",
        markers=_IM,
        roles=(*_PLAIN_ROLES, "tool"),
    ),
    ChatTemplate(
        "qwen-2.5",
        "qwen.jinja",
        "Qwen2.5 Instruct",
        aliases=("qwen-2",),
        stop="<|im_end|>",
        markers=_IM,
        system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        roles=_QWEN_TOOLS,
        tools=True,
        settings={"thinking": "false"},
    ),
    ChatTemplate(
        "qwen-3",
        "qwen.jinja",
        "Qwen3 with and without thoughts; those of earlier turns are left out",
        aliases=("qwen-3-thinking",),
        stop="<|im_end|>",
        markers=(*_IM, "<think>", "</think>"),
        roles=_QWEN_TOOLS,
        tools=True,
        settings={"thinking": "true"},
    ),
    ChatTemplate(
        "qwen-3-instruct",
        "qwen.jinja",
        "Qwen3 Instruct 2507, which does not think",
        stop="<|im_end|>",
        markers=_IM,
        roles=_QWEN_TOOLS,
        tools=True,
        settings={"thinking": "false"},
    ),
    ChatTemplate(
        "llama-3",
        "llama-3.jinja",
        "Llama 3 Instruct",
        stop="<|eot_id|>",
        markers=_LLAMA_3,
        begins_with_bos=True,
    ),
    _llama_3_1("llama-3.1", "llama-31"),
    _llama_3_1("llama-3.2", "llama-32"),
    _llama_3_1("llama-3.3", "llama-33"),
    ChatTemplate("llama-2", "llama-2.jinja", "Llama 2 Chat", aliases=("llama",), begins_with_bos=True),
    _gemma("gemma"),
    _gemma("gemma-2"),
    _gemma("gemma-3", "gemma-3n"),
    ChatTemplate(
        "phi-3",
        "phi-3.jinja",
        "Phi-3 and Phi-3.5",
        aliases=("phi-3.5", "phi-35"),
        stop="<|end|>",
        markers=("<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
    ),
    ChatTemplate(
        "phi-4",
        "phi-4.jinja",
        "Phi-4",
        stop="<|im_end|>",
        markers=("<|im_start|>", "<|im_sep|>"),
    ),
    _mistral(
        "mistral-v0.1",
        "Mistral and Mixtral Instruct v0.1 and Mistral v0.2, where [INST] is text",
        "mistral-v0.2",
        "mixtral",
        open_question="' [INST] '",
        close_question="' [/INST]'",
        system_first="true",
    ),
    _mistral(
        "mistral-v0.3",
        "Mistral Instruct v0.3, where [INST] is a token",
        markers=("[INST]", "[/INST]"),
        open_question="'[INST] '",
        close_question="'[/INST]'",
    ),
    _mistral(
        "mistral-nemo",
        "Mistral NeMo and others with the Tekken tokenizer",
        "mistral-tekken",
        markers=("[INST]", "[/INST]"),
        open_question="'[INST]'",
        close_question="'[/INST]'",
        space="''",
    ),
    ChatTemplate(
        "mistral-small",
        "mistral-small.jinja",
        "Mistral Small from 2501 on, with a system turn of its own",
        aliases=("mistral-v7-tekken",),
        markers=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        begins_with_bos=True,
    ),
    ChatTemplate(
        "alpaca",
        "alpaca.jinja",
        "Alpaca's headings: plain text, for any base model",
        system="Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.",
    ),
    ChatTemplate(
        "vicuna",
        "vicuna.jinja",
        "Vicuna v1.1 and v1.5: plain text, for any base model",
        system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.",
    ),
    ChatTemplate("zephyr", "zephyr.jinja", "Zephyr: headings in plain text, for any base model"),
    ChatTemplate(
        "unsloth",
        "unsloth.jinja",
        "'>>> User: ' and '>>> Assistant: ': plain text, for any base model",
        aliases=("plain",),
        system="You are a helpful assistant to the user",
    ),
)

#: Every template by its name.
TEMPLATES: dict[str, ChatTemplate] = {template.name: template for template in _ALL}


def _key(name: str) -> str:
    """A name without the signs that people write differently: Qwen2.5 and qwen-2.5 are one."""
    return re.sub(r"[-_. ]", "", name.lower())


_BY_KEY = {_key(name): template for template in _ALL for name in (template.name, *template.aliases)}


def find_template(name: str, tokenizer: Any) -> ChatTemplate:
    """The template of that name; ``mistral`` means the version that the tokenizer was made for.

    Raises:
        UnknownArgument: there is none, with the nearest name.
    """
    if _key(name) == "mistral":
        return TEMPLATES[_mistral_of(tokenizer)]
    if _key(name) not in _BY_KEY:
        raise UnknownArgument(
            f"there is no chat template '{name}'",
            where="chat_template",
            fix=nearest(name, [*TEMPLATES, "mistral"])
            or f"one of {', '.join([*TEMPLATES, 'mistral'])}, or a template's text",
        )
    return _BY_KEY[_key(name)]


def _mistral_of(tokenizer: Any) -> str:
    """Mistral's versions differ in which marks are tokens, and in whether spaces are written around them."""
    added = tokenizer.get_added_vocab()
    if "[INST]" not in added:
        return "mistral-v0.1"
    if "[SYSTEM_PROMPT]" in added:
        return "mistral-small"
    # SentencePiece writes a space as "▁", Tekken's bytes do not.
    return "mistral-v0.3" if "▁" in tokenizer.get_vocab() else "mistral-nemo"
