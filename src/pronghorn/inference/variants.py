"""A base model and its adapters, loaded once: each of them answers as a model of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pronghorn.errors import AdapterProblem, CommandMisused
from pronghorn.inference.batch import stop_tokens
from pronghorn.inference.generate import Messages, encode_chat


@dataclass(frozen=True)
class Variant:
    """The base model as it is, or through one of its adapters.

    Args:
        name: what users call it.
        adapter: what the model calls the adapter; None is the base.
        tokenizer: the adapter's own, with the chat template it was trained with, where its folder has one.
        stop_tokens: end an answer.
    """

    name: str
    adapter: str | None
    tokenizer: Any
    stop_tokens: tuple[int, ...]

    def chat_tokens(self, messages: Messages, **template: Any) -> tuple[int, ...]:
        """The conversation up to where the assistant speaks; `template` is for the chat template.

        Raises:
            TokenizerProblem: the tokenizer has no chat template.
        """
        return tuple(encode_chat(self.tokenizer, messages, **template)["input_ids"][0].tolist())

    def special_tokens(self, texts: Sequence[str]) -> list[int]:
        """Those of the texts that are tokens of their own, such as <|im_end|>: they have no text in an answer."""
        added = self.tokenizer.get_added_vocab()
        return [added[text] for text in texts if text in added]


def load_variants(
    model_name: str, adapters: Mapping[str, str], **loading: Any
) -> tuple[Any, tuple[Variant, ...]]:
    """(the model with all adapters on it, its variants: the base, then the adapters in their order).

    An adapter that brings whole modules of its own is the only variant.

    Args:
        model_name: a folder, a .gguf file or a hub id. An adapter stands for its base and itself; it comes first then.
        adapters: name -> folder or hub id.
        loading: for `FastLanguageModel.from_pretrained`.

    Raises:
        PronghornError: whatever is wrong with a name or a file; AdapterProblem for adapters that only one at a time
            can be on a model.
    """
    from pronghorn.loading import FastLanguageModel
    from pronghorn.loading.adapters import load_adapter
    from pronghorn.loading.source import base_of_adapter

    named = _on_disk(model_name)
    base = base_of_adapter(named) if named.kind == "adapter" else named
    own = {short_name(model_name): named} if named.kind == "adapter" else {}
    base_name = short_name(base.name) if own else short_name(model_name)
    sources = {**own, **{name: _on_disk(path) for name, path in adapters.items()}}
    if len(sources) < len(own) + len(adapters) or base_name in sources:
        raise CommandMisused(
            "two models have the same name", where=", ".join([base_name, *own, *adapters]), fix="rename one"
        )
    for name, source in sources.items():
        if source.kind != "adapter":
            raise AdapterProblem(
                f"'{name}' is no adapter", where=source.name, fix="give a PEFT adapter's folder"
            )
    model, tokenizer = FastLanguageModel.from_pretrained(base.name, max_seq_length=None, **loading)
    variants = [Variant(base_name, None, tokenizer, _stops(model, tokenizer))]
    for i, (name, source) in enumerate(sources.items()):
        # PEFT's names have no dots, and users' may.
        model = load_adapter(model, source, f"adapter{i}")
        used = _tokenizer_of(source, [variant.tokenizer for variant in variants])
        variants.append(Variant(name, f"adapter{i}", used, _stops(model, used)))
    model.eval()
    if _brings_modules(model, len(sources)):
        return model, tuple(variants[1:])
    return model, tuple([*variants[1:2], variants[0], *variants[2:]] if own else variants)


def short_name(model_name: str) -> str:
    """What a model is called: a folder's or a file's own name, or the hub id as it is."""
    from pathlib import Path

    path = Path(model_name).expanduser()
    if not path.exists():
        return model_name
    return path.stem if path.is_file() else path.resolve().name


def _on_disk(name: str) -> Any:
    from pronghorn.loading.hub import download
    from pronghorn.loading.source import locate

    source = locate(name)
    return source if source.is_local else download(source, token=None, trust_remote_code=False)


def _tokenizer_of(source: Any, known: list[Any]) -> Any:
    """The adapter's own tokenizer; one of those that are loaded already where it has none or the same."""
    from pronghorn.loading.tokenizer import has_tokenizer, load_tokenizer

    if not has_tokenizer(source):
        return known[0]
    own = load_tokenizer(source)
    return next((tokenizer for tokenizer in known if _alike(tokenizer, own)), own)


def _alike(one: Any, other: Any) -> bool:
    return (
        one.chat_template == other.chat_template
        and one.eos_token_id == other.eos_token_id
        and one.get_vocab() == other.get_vocab()
    )


def _stops(model: Any, tokenizer: Any) -> tuple[int, ...]:
    return tuple(stop_tokens(model, tokenizer))


def _brings_modules(model: Any, count: int) -> bool:
    """Whether an adapter has modules of its own that stand in for the base's, which nobody can ask then.

    Raises:
        AdapterProblem: when there are other adapters besides.
    """
    from pronghorn.inference.decoder import brings_modules

    brings = brings_modules(model)
    if brings and count > 1:
        raise AdapterProblem(
            "an adapter brings modules of its own (modules_to_save, trained tokens, an adapted embedding), so no other "
            "can be used beside it",
            fix="use it alone, or merge it",
        )
    return brings
