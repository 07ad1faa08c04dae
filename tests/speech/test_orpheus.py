"""Orpheus: the published places of tokens, and a tiny Llama that learns rows with SFTTrainer and speaks them again."""

import sys
import types
import wave

import numpy as np
import pytest
import torch
from datasets import Dataset

from pronghorn import FastLanguageModel, SFTConfig, SFTTrainer
from pronghorn.errors import CodecMissing, SpeechRowInvalid, UnsupportedCheckpoint
from pronghorn.speech import OrpheusLayout, generate_frames, orpheus
from pronghorn.speech.codec import SnacCodec, read_wave, write_wave
from pronghorn.speech.generate import GREEDY
from pronghorn.speech.orpheus import frames_of_levels, levels_of_frames
from tests.tiny import save_tiny, tiny_tokenizer

CODES = 12


def orpheus_tokenizer():
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    tokenizer.add_tokens([f"<custom_token_{i}>" for i in range(7 * CODES + 11)], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return orpheus_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = save_tiny(
        tmp_path_factory.mktemp("orpheus"), "llama", vocab_size=len(tokenizer), max_position_embeddings=256
    )
    tokenizer.save_pretrained(folder)
    return folder


def frames(count, seed=0):
    return np.random.default_rng(seed).integers(0, CODES, (7, count))


def test_the_published_numbers():
    layout = OrpheusLayout()
    assert (layout.speech, layout.end_of_speech, layout.human, layout.end_of_human) == (
        128257,
        128258,
        128259,
        128260,
    )
    assert (layout.ai, layout.end_of_ai, layout.padding, layout.audio) == (128261, 128262, 128263, 128266)
    assert layout.vocabulary == 128266 + 7 * 4096
    one = np.arange(1, 8)[:, None]
    assert layout.tokens(one) == [128266 + 4096 * i + i + 1 for i in range(7)]


def test_levels_and_frames():
    levels = [[1, 2], [10, 11, 12, 13], [20, 21, 22, 23, 24, 25, 26, 27]]
    found = frames_of_levels(levels)
    assert found.T.tolist() == [[1, 10, 20, 21, 11, 22, 23], [2, 12, 24, 25, 13, 26, 27]]
    assert levels_of_frames(found) == levels
    with pytest.raises(SpeechRowInvalid, match="2, 3, 8 codes"):
        frames_of_levels([levels[0], levels[1][:3], levels[2]])
    with pytest.raises(SpeechRowInvalid, match="three numbers"):
        frames_of_levels([1, 2, 3])


def test_a_layout_from_a_tokenizer(tokenizer):
    layout = OrpheusLayout.of(tokenizer)
    assert layout.text_vocabulary == tokenizer.convert_tokens_to_ids("<custom_token_0>")
    assert layout.codebook_size == CODES and layout.end_of_text == layout.text_vocabulary - 1
    with pytest.raises(UnsupportedCheckpoint, match="no audio tokens"):
        OrpheusLayout.of(tiny_tokenizer())


def test_a_row(tokenizer):
    layout = OrpheusLayout.of(tokenizer)
    row = layout.row(tokenizer, {"text": "Hello.", "voice": "tara", "codes": frames(2).tolist()})
    text = tokenizer("tara: Hello.")["input_ids"]
    prompt = [layout.human, *text, layout.end_of_text, layout.end_of_human, layout.ai, layout.speech]
    audio = [layout.audio + i % 7 * CODES + code for i, code in enumerate(frames(2).T.reshape(-1).tolist())]
    answer = [*audio, layout.end_of_speech, layout.end_of_ai]
    assert row == {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    whole = layout.row(tokenizer, {"text": "Hello.", "codes": frames(2).tolist()}, train_on_prompt=True)
    assert whole["labels"] == whole["input_ids"]
    assert layout.frames(row["input_ids"]).tolist() == frames(2).tolist()


def test_answers_that_go_wrong_end_there(tokenizer, caplog):
    layout = OrpheusLayout.of(tokenizer)
    tokens = layout.tokens(frames(3))
    assert layout.frames(tokens[:-2]).tolist() == frames(3)[:, :2].tolist()
    assert "not complete" in caplog.text
    tokens[9] = layout.audio
    assert layout.frames(tokens).tolist() == frames(3)[:, :1].tolist()
    assert "token 9" in caplog.text
    assert layout.frames([]).shape == (7, 0)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"codes": frames(1).tolist()}, "no text"),
        ({"text": "a"}, "neither codes nor audio"),
        ({"text": "a", "codes": frames(2)[:6].tolist()}, "6 codebooks"),
        ({"text": "a", "codes": (frames(2) + CODES).tolist()}, "outside of 0 to 11"),
        ({"text": "<custom_token_30>", "codes": frames(1).tolist()}, "no text token"),
    ],
)
def test_rows_that_are_refused(tokenizer, given, words):
    with pytest.raises(SpeechRowInvalid, match=words):
        OrpheusLayout.of(tokenizer).row(tokenizer, given)


def test_a_llama_learns_rows_and_speaks_them_again(folder, tmp_path):
    """Rows of the helper, SFTTrainer, generation, and back to arrays of codes."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), dtype="float32", load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
    layout = OrpheusLayout.of(tokenizer)
    texts = {"One.": frames(3, seed=1), "Two!": frames(2, seed=2)}
    rows = [layout.row(tokenizer, {"text": text, "codes": codes.tolist()}) for text, codes in texts.items()]
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=80, per_device_train_batch_size=2, learning_rate=1e-2,
        lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        logging_steps=1000, report=False,
    )  # fmt: skip
    SFTTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows)
    ).train()
    for text, codes in texts.items():
        spoken = generate_frames(model, tokenizer, text, sampling=GREEDY, max_frames=6)
        assert spoken.tolist() == codes.tolist(), text


# --- the codec ----------------------------------------------------------------------------------------------------


class FakeSnac:
    """Three levels of codes by the samples' number; what is decoded has the codes as samples."""

    @classmethod
    def from_pretrained(cls, name):
        if name == "gone":
            raise OSError("no such repository")
        return cls()

    def to(self, device):
        return self

    def eval(self):
        return self

    def encode(self, samples):
        count = samples.shape[-1] // 100
        return [torch.arange(count * each)[None] % CODES for each in (1, 2, 4)]

    def decode(self, codes):
        return codes[0].float()[None] / 100


@pytest.fixture(autouse=True)
def no_codec_is_kept():
    orpheus._default_codec.cache_clear()


@pytest.fixture
def snac(monkeypatch):
    monkeypatch.setitem(sys.modules, "snac", types.SimpleNamespace(SNAC=FakeSnac))


def test_audio_becomes_codes(snac, tokenizer, tmp_path):
    write_wave(tmp_path / "a.wav", np.sin(np.arange(250) / 10))
    layout = OrpheusLayout.of(tokenizer)
    row = layout.row(tokenizer, {"text": "a", "audio": "a.wav"}, folder=tmp_path)
    levels = [list(range(2)), list(range(4)), list(range(8))]
    assert orpheus._default_codec() is orpheus._default_codec()
    assert layout.frames(row["input_ids"]).tolist() == frames_of_levels(levels).tolist()
    assert SnacCodec().decode(levels) == pytest.approx([0, 0.01])


def test_audio_without_the_codec(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "snac", None)
    with pytest.raises(CodecMissing, match=r"PH321.*pip install 'pronghorn\[speech\]'"):
        OrpheusLayout.of(tokenizer).row(tokenizer, {"text": "a", "audio": "a.wav"})


def test_weights_of_the_codec_that_cannot_be_had(snac):
    with pytest.raises(CodecMissing, match="'gone' cannot be loaded"):
        SnacCodec("gone")


def test_waves(tmp_path):
    samples = np.linspace(-1, 1, 50)
    write_wave(tmp_path / "a.wav", samples)
    # 16 bits: half a step of 2^-15, and the scale's 2^15 - 1.
    assert read_wave(tmp_path / "a.wav", 24_000) == pytest.approx(samples, abs=2**-14)
    with pytest.raises(SpeechRowInvalid, match="16 bits at 24000 Hz, not 16 at 16000"):
        read_wave(tmp_path / "a.wav", 16_000)
    (tmp_path / "b.wav").write_bytes(b"no audio")
    with pytest.raises(SpeechRowInvalid, match="no WAV file"):
        read_wave(tmp_path / "b.wav", 24_000)
    with wave.open(str(tmp_path / "c.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(24_000)
        file.writeframes(np.array([[2**14, 0], [0, 0]], dtype="<i2").tobytes())
    assert read_wave(tmp_path / "c.wav", 24_000).tolist() == [0.25, 0.0]
