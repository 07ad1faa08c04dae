"""A tokenizer as GGUF metadata: tokens, types, merges or scores, the pre-tokenizer's name, special tokens, template."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from pronghorn.errors import NotExportable

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_GPT2 = "byte-level words"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: llama.cpp takes a word that is a token as it is under this name, and merges it step by step under the other.
_WHOLE_WORDS, _MERGED_WORDS = "llama-bpe", "dbrx"
#: How a byte-level tokenizer cuts text into words -> llama.cpp's name of that.
PRE_TOKENIZERS = {
    (_WORDS + r"\p{N}{1,3}" + _REST,): _WHOLE_WORDS,
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_CASED,): "tekken",
    (_CASED_O200K,): "gpt-4o",
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
}


@dataclass
class Vocabulary:
    """What `tokenizer.ggml.*` says. `merges` for byte-level BPE, `scores` for SentencePiece's."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a fast BPE tokenizer, filled up to the embedding's number of rows.

    Raises:
        NotExportable: for another kind of tokenizer, a way of cutting words that llama.cpp has no name for, or more
            tokens than the model embeds.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _no_form("the tokenizer is not a fast one", "load it with AutoTokenizer")
    described = json.loads(backend.to_str())
    bpe = described["model"]
    if bpe.get("type") != "BPE":
        raise _no_form(f"its tokenizer is a {bpe.get('type')} model and not BPE")
    tokens, types = _tokens(described, rows)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    if bpe.get("byte_fallback"):
        scores = _scores(bpe["vocab"], bpe["merges"], len(tokens))
        return Vocabulary(
            "llama", "default", tokens, types, scores=scores, space_prefix=_adds_space(described)
        )
    return Vocabulary("gpt2", pre_tokenizer_name(described), tokens, types, merges=merges)


def _tokens(described: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Token texts and types by id; ids that no token has become unused ones."""
    from gguf import TokenType

    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    bpe = described["model"]
    most = max([*bpe["vocab"].values(), *(added["id"] for added in described["added_tokens"])], default=0)
    if most >= rows:
        raise _no_form(
            f"the tokenizer has {most + 1} tokens and the model embeds {rows}",
            "model.resize_token_embeddings(len(tokenizer)) before training, or the tokenizer the model came with",
        )
    for token, index in bpe["vocab"].items():
        tokens[index], types[index] = token, int(TokenType.NORMAL)
        if bpe.get("byte_fallback") and _BYTE.fullmatch(token):
            types[index] = int(TokenType.BYTE)
        if token == bpe.get("unk_token"):
            types[index] = int(TokenType.UNKNOWN)
    for added in described["added_tokens"]:
        if types[added["id"]] == int(TokenType.UNKNOWN):
            continue
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tokens, types


def _scores(vocab: dict[str, int], merges: list[Any], size: int) -> list[float]:
    """SentencePiece joins the pair whose token has the highest score; BPE the one whose merge comes first."""
    order: dict[str, int] = {}
    for merge in merges:
        joined = "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)
        order.setdefault(joined, len(order))
    scores = [0.0] * size
    for token, index in vocab.items():
        scores[index] = -float(order.get(token, len(order)))
    return scores


def _adds_space(described: dict[str, Any]) -> bool:
    text = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")], ensure_ascii=False)
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def pre_tokenizer_name(described: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts text into words.

    Raises:
        NotExportable: when it has none that is known here: the file would be tokenised otherwise than in training.
    """
    given = described.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    cuts: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split":
            pattern = step.get("pattern", {})
            cuts.append(pattern.get("Regex") or pattern.get("String", ""))
        elif kind == "Digits" and step.get("individual_digits"):
            cuts.append("digits")
        elif kind == "ByteLevel":
            cuts += [_GPT2] if step.get("use_regex", True) else []
        else:
            cuts.append(str(kind))
    name = PRE_TOKENIZERS.get(tuple(cuts))
    if name is None:
        raise _no_form(f"llama.cpp's name for how its tokenizer cuts words is not known here ({cuts})")
    ignores_merges = described.get("model", {}).get("ignore_merges", False)
    return _MERGED_WORDS if name == _WHOLE_WORDS and not ignores_merges else name


def add_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: Any, stop_ids: list[int]) -> None:
    """Write `tokenizer.*`: the vocabulary, special tokens, whether text begins with BOS, the chat template.

    Args:
        stop_ids: tokens that end an answer, of the generation config.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    elif vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    for name, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(int(index))
    others = [index for index in stop_ids if index != ids["eos"]]
    if others:
        writer.add_eot_token_id(int(others[0]))
    encoded = list(tokenizer("a")["input_ids"])
    writer.add_add_bos_token(ids["bos"] is not None and encoded[:1] == [ids["bos"]])
    writer.add_add_eos_token(ids["eos"] is not None and encoded[-1:] == [ids["eos"]])
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _no_form(why: str, fix: str = "save_pretrained_merged keeps it") -> NotExportable:
    return NotExportable(f"the vocabulary cannot be written as GGUF: {why}", fix=fix)
