"""Fish-Speech's tokenizer: Hugging Face files, or a tiktoken vocabulary with a list of special tokens beside it."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pronghorn.errors import CheckpointCorrupt, UnsupportedCheckpoint
from pronghorn.loading.source import read_json

TIKTOKEN, SPECIAL = "tokenizer.tiktoken", "special_tokens.json"
START, END, VOICE = "<|im_start|>", "<|im_end|>", "<|voice|>"
_SEMANTIC = re.compile(r"<\|semantic:(\d+)\|>")

#: How the published vocabulary cuts text into words before it merges bytes. Part of the format, its slip included: the
#: seventh alternative asks for a question mark where a look-ahead was meant.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{P}|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(\?!\S)|\s+"
)


class SpeechTokenizer:
    """Text to tokens, with the ids that speech needs.

    Args:
        tokenizer: a fast tokenizer that has the semantic tokens `<|semantic:0|>`, `<|semantic:1|>`, …
        folder: where its files are, for `save_speech`.

    Raises:
        UnsupportedCheckpoint: it lacks special tokens, or its semantic tokens are not neighbours.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, folder: Path | None = None) -> None:
        self.tokenizer, self.folder = tokenizer, folder
        vocabulary = tokenizer.get_vocab()
        where = str(folder or "")
        lacking = [token for token in (START, END, VOICE) if token not in vocabulary]
        numbers = {int(m[1]): i for token, i in vocabulary.items() if (m := _SEMANTIC.fullmatch(token))}
        if lacking or not numbers:
            raise UnsupportedCheckpoint(
                f"the tokenizer lacks {', '.join(lacking) or '<|semantic:0|> and what follows it'}",
                where=where,
                fix="use a checkpoint with semantic tokens in its vocabulary: Fish-Speech 1.5, OpenAudio S1 or later",
            )
        first = numbers.get(0, -1)
        if any(numbers.get(code) != first + code for code in range(len(numbers))):
            raise UnsupportedCheckpoint(
                "the tokenizer's semantic tokens do not follow one another",
                where=where,
                fix="check its files",
            )
        self.semantic = first, first + len(numbers) - 1
        self.end = vocabulary[END]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; special tokens in it are taken as such."""
        return self.tokenizer.encode(text, add_special_tokens=False)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.tokenizer)


def read_tokenizer(folder: Path) -> SpeechTokenizer:
    """The tokenizer of a published checkpoint.

    Raises:
        CheckpointCorrupt: its files are missing or damaged.
        UnsupportedCheckpoint: it has no semantic tokens.
    """
    if (folder / TIKTOKEN).is_file():
        return SpeechTokenizer(_from_tiktoken(folder), folder)
    try:
        if (folder / "tokenizer.json").is_file():
            # AutoTokenizer would ask config.json, whose model type Transformers does not know.
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointCorrupt(
            f"the tokenizer cannot be read: {reason}",
            where=str(folder),
            fix=f"put {TIKTOKEN} and {SPECIAL}, or tokenizer.json, beside config.json",
        ) from error
    return SpeechTokenizer(tokenizer, folder)


def _from_tiktoken(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE with tiktoken's ranks: two pieces merge into a token at that token's rank."""
    ranks = _ranks(folder / TIKTOKEN)
    special = read_json(folder / SPECIAL)
    if not all(isinstance(number, int) for number in special.values()):
        raise CheckpointCorrupt(
            f"{SPECIAL} is no list of token numbers", where=str(folder), fix="download it again"
        )
    letters = _letters()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (spelt[token[:cut]], spelt[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {spelt[token]: rank for token, rank in ranks.items()}
    model = models.BPE(vocab=vocabulary | special, merges=merges, ignore_merges=True, fuse_unk=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    by_number = sorted(special, key=special.__getitem__)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in by_number])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            if token != b"=":  # how an empty token is written
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise CheckpointCorrupt(
                f"{path.name} is no tiktoken vocabulary: {error}",
                where=f"{path}, line {number}",
                fix="download it again",
            ) from error
    return ranks


def _letters() -> dict[int, str]:
    """Byte-level BPE's letter for every byte: itself where it prints, else one from 256 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(others)}
