"""Rows of text and codes: what the model reads, and what is refused."""

import json

import numpy as np
import pytest

from pronghorn.errors import CodecMissing, SpeechRowInvalid
from pronghorn.speech import Reference, SpeechRows, SpeechTokenizer
from pronghorn.speech.collator import SpeechCollator
from pronghorn.speech.layout import config_of
from pronghorn.speech.rows import read_rows
from tests.speech.tiny import BOOKS, CODES, FLAT, random_codes, speech_tokenizer


@pytest.fixture(scope="module")
def rows():
    tokenizer = SpeechTokenizer(speech_tokenizer())
    return SpeechRows(config_of(FLAT, tokenizer.semantic), tokenizer)


def test_a_row_reads_as_the_published_prompt(rows):
    codes = random_codes(3)
    row = rows.row({"text": "Say it.", "codes": codes.tolist()})
    spoken = "".join(f"<|semantic:{code}|>" for code in codes[0])
    assert rows.tokenizer.tokenizer.decode(row["input_ids"]) == (
        "<|im_start|>system\nconvert the provided text to speech<|im_end|>\n"
        f"<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n<|voice|>{spoken}<|im_end|>"
    )
    first = rows.tokenizer.semantic[0]
    assert row["labels"][-4:].tolist() == [*(codes[0] + first), rows.tokenizer.end]
    assert (row["labels"][:-4] == -100).all()
    assert (row["codes"][:, -4:-1] == codes).all() and not row["codes"][:, :-4].any()


def test_a_voice_to_speak_in(rows):
    reference = Reference("Me.", random_codes(2, seed=1))
    prompt = rows.prompt("Say it.", reference)
    spoken = "".join(f"<|semantic:{code}|>" for code in reference.codes[0])
    text = rows.tokenizer.tokenizer.decode(prompt["input_ids"])
    assert f"reference to the following:\n\nText:\n<|speaker:0|>Me.\n\nSpeech:\n{spoken}<|im_end|>" in text
    first, last = rows.tokenizer.semantic
    at = np.flatnonzero((prompt["input_ids"] >= first) & (prompt["input_ids"] <= last))
    assert (prompt["codes"][:, at] == reference.codes).all()
    given = {"text": "Say it.", "codes": random_codes(3), "reference_text": "Me."}
    row = rows.row(given | {"reference_codes": reference.codes.tolist()})
    assert (row["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]).all()
    assert (row["labels"] >= 0).sum() == 4  # the reference's frames are read, not learned
    with pytest.raises(SpeechRowInvalid, match="one of which is missing"):
        rows.row(given)


def test_codes_from_a_file_beside_the_rows(rows, tmp_path):
    np.save(tmp_path / "a.npy", random_codes(3).astype(np.int16))
    beside = SpeechRows(rows.config, rows.tokenizer, tmp_path)
    named = beside.row({"text": "Say it.", "codes": "a.npy"})
    assert (named["codes"] == rows.row({"text": "Say it.", "codes": random_codes(3)})["codes"]).all()


def codes_with(value, book=1):
    codes = random_codes(3)
    codes[book, 2] = value
    return codes.tolist()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"codes": codes_with(0)}, "no text"),
        ({"text": " ", "codes": codes_with(0)}, "no text"),
        ({"text": "a"}, "no codes"),
        ({"text": "a", "codes": []}, "empty"),
        ({"text": "a", "codes": [[]] * BOOKS}, "empty"),
        ({"text": "a", "codes": [1, 2, 3]}, r"shape \[3\]"),
        (
            {"text": "a", "codes": random_codes(5)[:3]},
            f"3 codebooks, the model has {BOOKS}.*codec of this model",
        ),
        ({"text": "a", "codes": random_codes(5).T}, "transpose"),
        ({"text": "a", "codes": [[1, 2], [3]] * 2}, "different numbers of frames"),
        ({"text": "a", "codes": [[0.5, 2]] * BOOKS}, "no whole numbers"),
        (
            {"text": "a", "codes": codes_with(CODES)},
            f"code {CODES} of codebook 1, frame 2, .* 0 to {CODES - 1}",
        ),
        ({"text": "a", "codes": codes_with(-1, book=0)}, "code -1 of codebook 0"),
        ({"text": "a", "codes": "gone.npy"}, "no such file"),
        ({"text": "a", "codes": "gone.wav"}, r"no \.npy file"),
        ({"text": "a" * 300, "codes": random_codes(3)}, "256 positions"),
    ],
)
def test_rows_that_are_refused(rows, given, words):
    with pytest.raises(SpeechRowInvalid, match=f"PH320.*{words}"):
        rows.row(given)


def test_a_pickle_among_the_codes_is_not_read(rows, tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(SpeechRowInvalid, match="cannot be read"):
        SpeechRows(rows.config, rows.tokenizer, tmp_path).row({"text": "a", "codes": "a.npy"})


def test_audio_instead_of_codes(rows):
    with pytest.raises(CodecMissing, match="fish-speech package"):
        rows.row({"text": "a", "audio": "a.wav"})


def test_a_bad_row_is_named_with_its_line(rows, tmp_path):
    file = tmp_path / "rows.jsonl"
    good = {"text": "a", "codes": random_codes(2).tolist()}
    file.write_text(f"{json.dumps(good)}\n{json.dumps({'text': 'b'})}\n")
    with pytest.raises(SpeechRowInvalid, match=r"rows\.jsonl, line 2"):
        read_rows(file, rows.row)
    file.write_text('{"text": \n')
    with pytest.raises(SpeechRowInvalid, match="line 1"):
        read_rows(file, rows.row)
    file.write_text("\n")
    with pytest.raises(SpeechRowInvalid, match="no rows"):
        read_rows(file, rows.row)


def test_a_batch_is_one_stream(rows):
    made = [rows.row({"text": "a" * n, "codes": random_codes(n)}) for n in (2, 5)]
    batch = SpeechCollator(rows.tokenizer.semantic)(made)
    length = len(made[0]["input_ids"])
    assert batch["cu_seq_lens_q"].tolist() == [0, length, length + len(made[1]["input_ids"])]
    assert batch["frames"] == 7 and batch["supervised"] == 9
    positions = batch["frame_rows"] + 1
    frames = batch["codes"][0][:, positions]
    assert (frames.numpy() == np.concatenate([random_codes(2), random_codes(5)], axis=1)).all()
    first = rows.tokenizer.semantic[0]
    assert (batch["input_ids"][0, positions] == frames[0] + first).all()
