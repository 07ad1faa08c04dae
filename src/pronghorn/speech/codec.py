"""Audio and codes. Codecs are packages of their own; this knows how to ask one, and what to say where there is none.

SNAC (Orpheus' codec) comes with the extra `speech`. Fish-Speech's codec is part of its own package, whose licence is
not this library's; its command writes the .npy files that rows name.
"""

from __future__ import annotations

import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pronghorn.errors import CodecMissing, SpeechRowInvalid

AUDIO_COLUMNS = ("audio", "wav", "path")
SNAC_MODEL, SNAC_RATE = "hubertsiuzdak/snac_24khz", 24_000


def refuse_audio(given: Mapping[str, Any]) -> None:
    """Say what to do about a row of a Fish-Speech model that holds audio.

    Raises:
        CodecMissing: where it does.
    """
    for column in AUDIO_COLUMNS:
        if given.get(column) is not None:
            raise CodecMissing(
                f"the row holds audio ('{column}'), and Fish-Speech's codec is not part of this library",
                fix="encode the recordings with the fish-speech package (its DAC writes .npy files of codes), and name "
                "those files in 'codes'",
            )


class SnacCodec:
    """Orpheus' codec at 24 kHz, as the package `snac` has it.

    Raises:
        CodecMissing: the package is not installed, or its weights cannot be had.
    """

    def __init__(self, model: str = SNAC_MODEL, device: str = "cpu") -> None:
        try:
            from snac import SNAC
        except ImportError:
            raise CodecMissing(
                "the rows hold audio, and the codec's package snac is not installed",
                fix="pip install 'pronghorn[speech]', or give rows with 'codes'",
            ) from None
        try:
            self.codec = SNAC.from_pretrained(model).to(device).eval()
        except (OSError, ValueError) as error:
            raise CodecMissing(
                f"the codec '{model}' cannot be loaded: {' '.join(str(error).split())[:200]}",
                fix="check the network, or give the folder of its weights",
            ) from error
        self.device = device

    def encode(self, path: Path) -> list[list[int]]:
        """The three lists of codes of a WAV file, of lengths F, 2F and 4F.

        Raises:
            SpeechRowInvalid: it is no 16-bit PCM file at 24 kHz.
        """
        import torch

        samples = torch.from_numpy(read_wave(path, SNAC_RATE))[None, None].to(self.device)
        with torch.inference_mode():
            return [codes[0].tolist() for codes in self.codec.encode(samples)]

    def decode(self, levels: list[list[int]]) -> np.ndarray:
        """Samples [n] float32 at 24 kHz of three lists of codes."""
        import torch

        codes = [torch.tensor(level, device=self.device)[None] for level in levels]
        with torch.inference_mode():
            samples = self.codec.decode(codes)
        return samples.float().cpu().numpy().reshape(-1)  # type: ignore[no-any-return]


def read_wave(path: Path, rate: int) -> np.ndarray:
    """Samples [n] in -1 to 1 of a 16-bit PCM file, channels averaged.

    Raises:
        SpeechRowInvalid: it cannot be read, or has another rate or width.
    """
    again = f"ffmpeg -i IN -ar {rate} -ac 1 -c:a pcm_s16le OUT.wav makes such a file"
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, found = file.getnchannels(), file.getsampwidth(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise SpeechRowInvalid(f"'{path}' is no WAV file that can be read: {error}", fix=again) from None
    if width != 2 or found != rate or not raw:
        raise SpeechRowInvalid(f"'{path}' has {8 * width} bits at {found} Hz, not 16 at {rate}", fix=again)
    samples = np.frombuffer(raw, dtype="<i2").reshape(-1, channels).astype(np.float32)
    return samples.mean(axis=1) / 2**15


def write_wave(path: Path, samples: np.ndarray, rate: int = SNAC_RATE) -> None:
    """Write samples in -1 to 1 as a 16-bit PCM file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * (2**15 - 1)).astype("<i2").tobytes())
