"""Tokens to text: letters whole, stop strings wherever tokens begin and end."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pronghorn.inference.server.text import StopStrings, TextDecoder, TokenNames
from tests.tiny import tiny_tokenizer

BYTE_LEVEL = tiny_tokenizer()


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with ▁, bytes outside of the vocabulary are tokens of their own."""
    words = ["<unk>", "▁the", "▁fast", "est", "▁deer", "é"]
    pieces = {word: i for i, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


BYTE_FALLBACK = byte_fallback_tokenizer()


def fed(tokenizer, tokens, before=()):
    decoder = TextDecoder(tokenizer, before)
    return [*(decoder.feed(token) for token in tokens), decoder.finish()]


@settings(deadline=None)
@given(st.text(max_size=30))
def test_pieces_are_the_text_and_no_letter_is_cut(text):
    tokens = BYTE_LEVEL(text, add_special_tokens=False)["input_ids"]
    pieces = fed(BYTE_LEVEL, tokens)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces[-1] == ""  # a whole text leaves nothing behind


@settings(deadline=None)
@given(st.lists(st.integers(5, 260), max_size=24))
def test_any_tokens_give_what_decoding_gives(tokens):
    """Bytes in any order, most of which are no text."""
    whole = BYTE_LEVEL.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(fed(BYTE_LEVEL, tokens)) == whole


def test_a_letter_of_four_tokens_comes_whole():
    tokens = BYTE_LEVEL("🦌", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 4
    assert fed(BYTE_LEVEL, tokens) == ["", "", "", "🦌", ""]
    assert fed(BYTE_LEVEL, tokens[:3])[-1] == "\ufffd"


def test_noise_does_not_swallow_the_letter_after_it():
    a, b, c, d = BYTE_LEVEL("🦌", add_special_tokens=False)["input_ids"]
    assert "".join(fed(BYTE_LEVEL, [d, d, d, d, d, a, b, c, d])) == "\ufffd" * 5 + "🦌"


def test_special_tokens_have_no_text():
    tokens = BYTE_LEVEL("one<|im_end|>two")["input_ids"]
    assert "".join(fed(BYTE_LEVEL, tokens)) == "onetwo"


def test_words_keep_their_spaces():
    ids = BYTE_FALLBACK.convert_tokens_to_ids
    tokens = [ids("▁the"), ids("▁fast"), ids("est"), ids("▁deer")]
    assert fed(BYTE_FALLBACK, tokens) == ["the", " fast", "est", " deer", ""]
    # What goes on from a prompt begins with its space.
    assert fed(BYTE_FALLBACK, tokens[1:], before=tokens[:1]) == [" fast", "est", " deer", ""]


def test_bytes_outside_of_the_vocabulary():
    bytes_of = [BYTE_FALLBACK.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "é🦌".encode()]
    pieces = fed(BYTE_FALLBACK, bytes_of)
    assert "".join(pieces) == "é🦌"
    assert not any("\ufffd" in piece for piece in pieces)


def stopped(stops, pieces):
    cutter = StopStrings(stops)
    text = "".join(cutter.feed(piece) for piece in pieces)
    return text + ("" if cutter.found else cutter.finish()), cutter.found


@pytest.mark.parametrize(
    "stops,text,expected",
    [
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        (["END"], "ENENDx", "EN"),
        (["END"], "the EN", "the EN"),
        (["abcd", "bc"], "xabcdy", "xa"),  # complete first
        (["bc", "abc"], "xabcy", "x"),  # together: the longer
        (["aab"], "aaaab", "aa"),
        (["ß"], "Maßstab", "Ma"),
        ([], "anything", "anything"),
    ],
)
def test_the_text_before_a_stop_string(stops, text, expected):
    assert stopped(stops, [text]) == (expected, expected != text)
    assert stopped(stops, list(text)) == (expected, expected != text)


@settings(deadline=None)
@given(
    st.text("ab\n", max_size=20),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    st.integers(0, 10**9),
)
def test_pieces_make_no_difference_to_stop_strings(text, stops, seed):
    rng = random.Random(seed)
    cuts = sorted(rng.randint(0, len(text)) for _ in range(4))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert stopped(stops, pieces) == stopped(stops, list(text)) == stopped(stops, [text])


def test_nothing_that_may_begin_a_stop_string_is_handed_out():
    cutter = StopStrings(["</answer>"])
    assert cutter.feed("yes</ans") == "yes"
    assert cutter.feed("wers") == "</answers"
    assert cutter.feed("</answer") == ""
    assert cutter.feed("> and more") == ""
    assert cutter.found
    assert cutter.feed("still more") == ""


def test_the_bytes_of_tokens():
    names = TokenNames(BYTE_LEVEL)
    tokens = BYTE_LEVEL("é \n", add_special_tokens=False)["input_ids"]
    assert bytes(b for token in tokens for b in names.bytes(token)) == "é \n".encode()
    assert TokenNames(BYTE_FALLBACK).bytes(BYTE_FALLBACK.convert_tokens_to_ids("<0xF0>")) == [0xF0]
    assert TokenNames(BYTE_FALLBACK).text(BYTE_FALLBACK.convert_tokens_to_ids("▁deer")) == " deer"
