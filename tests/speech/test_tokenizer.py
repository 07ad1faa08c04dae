"""tiktoken's vocabulary as a fast tokenizer: the same tokens as merging by rank, and any text comes back."""

import json
from itertools import pairwise

import pytest

from pronghorn.errors import CheckpointCorrupt, UnsupportedCheckpoint
from pronghorn.speech.tokenizer import _WORDS, SpeechTokenizer, read_tokenizer
from tests.speech.tiny import CODES, save_tiktoken
from tests.tiny import tiny_tokenizer

regex = pytest.importorskip("regex")


@pytest.fixture
def folder(tmp_path):
    save_tiktoken(tmp_path)
    return tmp_path


def by_rank(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule: a word is its token, or its bytes, of which the pair of lowest rank merges first."""
    found = []
    for match in regex.finditer(_WORDS, text):
        word = match[0]
        pieces = [bytes([byte]) for byte in word.encode()]
        while len(pieces) > 1:
            joined = [ranks.get(a + b, 10**9) for a, b in pairwise(pieces)]
            at = joined.index(min(joined))
            if joined[at] == 10**9:
                break
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        found += [ranks[word.encode()]] if word.encode() in ranks else [ranks[piece] for piece in pieces]
    return found


@pytest.mark.parametrize("text", ["hello world", "hell, ähell  wor\n\nld 1234!", "日本語 it's", "a  ?!b"])
def test_text(folder, text):
    tokenizer = read_tokenizer(folder)
    words = [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b" world", b"\xc3\xa4"]
    ranks = {token: i for i, token in enumerate([bytes([i]) for i in range(256)] + words)}
    assert tokenizer.encode(text) == by_rank(text, ranks)
    assert tokenizer.tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(folder):
    tokenizer = read_tokenizer(folder)
    special = json.loads((folder / "special_tokens.json").read_text())
    assert tokenizer.encode("<|im_start|>hello<|semantic:3|>") == [
        special["<|im_start|>"], 259, special["<|semantic:3|>"],
    ]  # fmt: skip
    assert tokenizer.semantic == (special["<|semantic:0|>"], special["<|semantic:0|>"] + CODES - 1)
    assert tokenizer.end == special["<|im_end|>"] and len(tokenizer) == 266 + len(special)


def test_a_damaged_vocabulary_is_named_with_its_line(folder):
    with (folder / "tokenizer.tiktoken").open("a") as file:
        file.write("no base64! 999\n")
    with pytest.raises(CheckpointCorrupt, match="line 267"):
        read_tokenizer(folder)


def test_no_files(tmp_path):
    with pytest.raises(CheckpointCorrupt, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_of_text_alone():
    with pytest.raises(UnsupportedCheckpoint, match="voice"):
        SpeechTokenizer(tiny_tokenizer())


def test_semantic_tokens_with_a_gap():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|voice|>", "<|semantic:0|>", "other", "<|semantic:1|>"], special_tokens=True)
    with pytest.raises(UnsupportedCheckpoint, match="do not follow"):
        SpeechTokenizer(tokenizer)
