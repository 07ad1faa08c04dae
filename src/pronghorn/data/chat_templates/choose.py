"""`get_chat_template`: a named or own chat template put on a tokenizer, after a check that the two belong together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pronghorn.data.chat_templates.compose import compose, renaming
from pronghorn.data.chat_templates.fit import control_tokens, difference, is_whole, missing_markers, puts_bos
from pronghorn.data.chat_templates.registry import TEMPLATES, ChatTemplate, find_template
from pronghorn.data.templates import ChatRenderer
from pronghorn.errors import ChatTemplateMismatch, TokenizerProblem, UnknownArgument

logger = logging.getLogger("pronghorn")

MissingTokens = Literal["error", "text", "add"]
_QUESTION, _ANSWER = "Ж1", "Ж2"


@dataclass(frozen=True)
class _Choice:
    """A template on its way to a tokenizer."""

    name: str
    markers: tuple[str, ...]
    stop: str | None
    template: ChatTemplate | None
    text: str = ""


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[Any, ...] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
    *,
    missing_tokens: MissingTokens = "error",
    model: Any = None,
) -> Any:
    """Put a chat template on a tokenizer; returns the tokenizer. It is changed only when everything fits.

    Args:
        chat_template: a name (see `pronghorn.data.chat_templates.TEMPLATES`), a template's text, or (text, stop token).
        mapping: what the rows call `role`, `content`, `user` and `assistant`, for rows like
            ``{"from": "human", "value": ...}``. Rows with the plain names are understood all the same.
        map_eos_token: the token that ends an answer becomes the tokenizer's EOS, at which generation stops; where the
            tokenizer does not have it, answers end with its own EOS instead. Without it, a template whose answers do
            not end with the EOS is refused.
        system_message: the system message of conversations without one, instead of the template's own.
        missing_tokens: what happens to control tokens that the tokenizer would cut into pieces: ``"error"`` refuses,
            ``"text"`` leaves them as plain text, ``"add"`` adds them to the tokenizer and to `model`'s embeddings.
        model: the model whose embeddings grow with ``"add"``; before an adapter is put on it.

    Raises:
        UnknownArgument: an unknown name, or an argument outside its choices.
        ChatTemplateMismatch: the template writes tokens that the tokenizer does not have, with the difference.
        TokenizerProblem: the tokenizer has no EOS, and answers would have no end.
    """
    if missing_tokens not in ("error", "text", "add"):
        raise UnknownArgument(f"missing_tokens='{missing_tokens}'", fix="one of error, text, add")
    text, stop = chat_template, None
    if isinstance(chat_template, tuple):
        text, stop, *rest = chat_template
        map_eos_token = bool(rest[0]) if rest else map_eos_token
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    choice = _chosen(inner, text, stop)
    added = _tokens_to_add(inner, choice, missing_tokens, map_eos_token, model)
    stop = choice.stop
    if stop is not None and stop not in added and map_eos_token and not is_whole(inner, stop):
        stop = None  # answers end with the tokenizer's EOS
    _check_end(inner, choice, stop, map_eos_token)
    composed = _text(inner, choice, stop, mapping, system_message)

    if added:
        add_tokens(inner, added, model)
    if stop is not None and stop != inner.eos_token and map_eos_token:
        logger.info("pronghorn: the EOS token is now '%s', which ends answers of '%s'", stop, choice.name)
        inner.eos_token = stop
    elif choice.stop is not None and stop is None:
        logger.warning(
            "pronghorn: the tokenizer has no '%s': answers of the template '%s' end with its EOS '%s'",
            choice.stop, choice.name, inner.eos_token,
        )  # fmt: skip
    inner.chat_template = composed
    if inner is not tokenizer:
        tokenizer.chat_template = composed
    return tokenizer


def add_tokens(tokenizer: Any, tokens: list[str], model: Any) -> None:
    """New tokens for the tokenizer, and rows for them in the model's embeddings: the mean of the others.

    They mean nothing yet: they must be trained, with `modules_to_save=["embed_tokens", "lm_head"]` beside an adapter.
    """
    import torch

    known = len(tokenizer)
    tokenizer.add_tokens(tokens, special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        # Transformers' own start is drawn at random; a multiple of 64 keeps the head's product fast.
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                module.weight[known:] = module.weight[:known].float().mean(0).to(module.weight.dtype)
    logger.warning(
        "pronghorn: new tokens (%s) must be trained: get_peft_model(modules_to_save=['embed_tokens', 'lm_head']), "
        "or full fine-tuning",
        " ".join(tokens),
    )


def fitting_templates(tokenizer: Any) -> list[str]:
    """Names of the templates whose tokens the tokenizer has."""
    return [
        name
        for name, template in TEMPLATES.items()
        if not missing_markers(tokenizer, [*template.markers, *([template.stop] if template.stop else [])])
    ]


def _chosen(tokenizer: Any, chat_template: Any, stop: str | None) -> _Choice:
    if not isinstance(chat_template, str):
        raise UnknownArgument(
            f"chat_template is {type(chat_template).__name__}", fix="give a name, or a template's text"
        )
    if "{{" not in chat_template and "{%" not in chat_template:
        template = find_template(chat_template, tokenizer)
        return _Choice(template.name, template.markers, stop or template.stop, template)
    rendered = _sample(tokenizer, chat_template)
    end = control_tokens(rendered.partition(_ANSWER)[2])
    if stop in (None, "eos_token"):
        stop = end[0] if end and end[0] != tokenizer.eos_token else None
    markers = tuple(token for token in control_tokens(rendered) if token != stop)
    return _Choice("given as text", markers, stop, None, chat_template)


def _sample(tokenizer: Any, text: str) -> str:
    """One question and its answer in a template of the user's own, whatever it calls role and content."""
    messages = [
        {"role": "user", "content": _QUESTION, "from": "human", "value": _QUESTION},
        {"role": "assistant", "content": _ANSWER, "from": "gpt", "value": _ANSWER},
    ]
    return ChatRenderer(tokenizer, chat_template=text).text(messages)


def _tokens_to_add(
    tokenizer: Any, choice: _Choice, missing_tokens: MissingTokens, map_eos_token: bool, model: Any
) -> list[str]:
    """The markers to add to the tokenizer; none unless asked for.

    Raises:
        ChatTemplateMismatch: markers are missing and are not to be added, or cannot be.
    """
    missing = missing_markers(tokenizer, [*choice.markers, *([choice.stop] if choice.stop else [])])
    if missing_tokens == "add" and missing:
        if model is None:
            raise ChatTemplateMismatch(
                "new tokens need rows in the model's embeddings",
                fix="give model=, before its adapter is put on",
            )
        if hasattr(model, "peft_config"):
            raise ChatTemplateMismatch(
                "the model has an adapter already, which would not learn new tokens",
                fix="call get_chat_template before get_peft_model, and give that modules_to_save=['embed_tokens', "
                "'lm_head']",
            )
        return missing
    replaced = choice.stop if map_eos_token and (choice.template or str(choice.stop) in choice.text) else None
    refused = [marker for marker in missing if marker != replaced]
    if refused and missing_tokens == "error":
        fitting = [name for name in fitting_templates(tokenizer) if name != choice.name]
        raise ChatTemplateMismatch(
            f"the chat template '{choice.name}' writes what this tokenizer does not have as tokens: "
            f"{difference(tokenizer, refused)}",
            where=str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__),
            fix=f"a template that fits ({', '.join(fitting)}), missing_tokens='add' with model= to add the tokens, "
            "or missing_tokens='text' to write them as plain text",
        )
    return []


def _check_end(tokenizer: Any, choice: _Choice, stop: str | None, map_eos_token: bool) -> None:
    """Refuse answers that end with nothing generation stops at.

    Raises:
        TokenizerProblem: they shall end with EOS, and there is none.
        ChatTemplateMismatch: they end with another token, and EOS is to stay.
    """
    if stop is None and tokenizer.eos_token is None:
        raise TokenizerProblem(
            "the tokenizer has no EOS token, so answers would have no end",
            fix="set tokenizer.eos_token, or choose a template whose end of turn the tokenizer has",
        )
    own = getattr(tokenizer, "chat_template", None) or ""
    if stop is not None and stop != tokenizer.eos_token and not map_eos_token and stop not in str(own):
        raise ChatTemplateMismatch(
            f"the chat template '{choice.name}' ends answers with '{stop}', and the tokenizer's EOS is "
            f"'{tokenizer.eos_token}': generation would not stop",
            fix=f"map_eos_token=True, which makes '{stop}' the EOS",
        )


def _text(
    tokenizer: Any, choice: _Choice, stop: str | None, mapping: Mapping[str, str] | None, system: str | None
) -> str:
    if choice.template is None:
        text = choice.text
        if stop is None and choice.stop is not None:
            text = text.replace(choice.stop, tokenizer.eos_token)
        renamed = renaming(mapping)
        return f"{renamed}\n{text}" if renamed and _needs_names(text) else text
    template = choice.template
    return compose(
        template,
        stop=stop,
        begin=template.begins_with_bos or puts_bos(tokenizer),
        system=template.system if system is None else system,
        mapping=mapping,
    )


def _needs_names(text: str) -> bool:
    """Whether a template of the user's own reads the plain names, so that mapped rows must be renamed for it."""
    return any(name in text for name in ("['role']", '["role"]', ".role"))
