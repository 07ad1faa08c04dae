"""Orpheus: a Llama whose vocabulary goes on with audio tokens. Its rows are ordinary token rows for `SFTTrainer`.

    <human> text <end of text> <end of human> <ai> <speech> c_0 … c_6 c_0 … c_6 … <end of speech> <end of ai>

A frame of SNAC's three levels is seven tokens, each from a range of its own:

    place     0    1     2     3       4       5       6
    level     0    1     2     2       1       2       2
    code      i   2i    4i   4i + 1  2i + 1  4i + 2  4i + 3      token = audio + place · codebook_size + code
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pronghorn.data.tokens import IGNORED
from pronghorn.errors import SpeechRowInvalid, UnsupportedCheckpoint
from pronghorn.speech.codec import AUDIO_COLUMNS, SnacCodec
from pronghorn.speech.codes import read_codes

logger = logging.getLogger("pronghorn")

PLACES = 7
#: level and position in it of every place of a frame, of which a level has 1, 2 or 4
_LEVELS = ((0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (2, 2), (2, 3))
_PER_FRAME = (1, 2, 4)
_CUSTOM, _END_OF_TEXT = "<custom_token_", "<|eot_id|>"
#: tokens between text and codes
_BEFORE_CODES = 10


@dataclass(frozen=True)
class OrpheusLayout:
    """Where the tokens are.

    Args:
        text_vocabulary: tokens of the Llama it was made of; all others follow.
        end_of_text: the text's last token, one of the Llama's.
        codebook_size: codes of a place.
    """

    text_vocabulary: int = 128_256
    end_of_text: int = 128_009
    codebook_size: int = 4096

    @staticmethod
    def of(tokenizer: Any) -> OrpheusLayout:
        """The layout that a tokenizer has: <custom_token_0> follows its text tokens, the tenth is the first code.

        Raises:
            UnsupportedCheckpoint: it has no audio tokens.
        """
        vocabulary = tokenizer.get_vocab()
        first, end = vocabulary.get(f"{_CUSTOM}0>"), vocabulary.get(_END_OF_TEXT)
        count = sum(token.startswith(_CUSTOM) for token in vocabulary)
        if first is None or end is None or count < _BEFORE_CODES + PLACES:
            raise UnsupportedCheckpoint(
                f"the tokenizer has no audio tokens ({_CUSTOM}0>, … and {_END_OF_TEXT})",
                where=str(getattr(tokenizer, "name_or_path", "")),
                fix="use an Orpheus checkpoint with its tokenizer",
            )
        return OrpheusLayout(first, end, (count - _BEFORE_CODES) // PLACES)

    @property
    def speech(self) -> int:
        """Speech begins; `speech` + 1 ends it, then come human, its end, AI, its end, and padding."""
        return self.text_vocabulary + 1

    @property
    def end_of_speech(self) -> int:
        return self.text_vocabulary + 2

    @property
    def human(self) -> int:
        return self.text_vocabulary + 3

    @property
    def end_of_human(self) -> int:
        return self.text_vocabulary + 4

    @property
    def ai(self) -> int:
        return self.text_vocabulary + 5

    @property
    def end_of_ai(self) -> int:
        return self.text_vocabulary + 6

    @property
    def padding(self) -> int:
        return self.text_vocabulary + 7

    @property
    def audio(self) -> int:
        """The first audio token."""
        return self.text_vocabulary + _BEFORE_CODES

    @property
    def vocabulary(self) -> int:
        """All tokens."""
        return self.audio + PLACES * self.codebook_size

    def tokens(self, frames: np.ndarray) -> list[int]:
        """Audio tokens of frames [7, F], in the order they are spoken."""
        offsets = self.audio + self.codebook_size * np.arange(PLACES)[:, None]
        return (frames + offsets).T.reshape(-1).tolist()  # type: ignore[no-any-return]

    def frames(self, tokens: Sequence[int]) -> np.ndarray:
        """Frames [7, F] of an answer's tokens: what is between the beginning of speech, if it is there, and its end.

        An answer ends early where a token is not of its place; what is left of a frame then goes, and is logged.
        """
        given = list(tokens)
        if self.speech in given:
            given = given[given.index(self.speech) + 1 :]
        if self.end_of_speech in given:
            given = given[: given.index(self.end_of_speech)]
        codes = []
        for index, token in enumerate(given):
            code = token - self.audio - index % PLACES * self.codebook_size
            if not 0 <= code < self.codebook_size:
                logger.warning(
                    "pronghorn: token %d of an answer is no code of its place: the rest is left out", index
                )
                break
            codes.append(code)
        if len(codes) % PLACES:
            logger.warning("pronghorn: the last frame of an answer is not complete and left out")
        whole = len(codes) // PLACES
        return np.asarray(codes[: whole * PLACES], dtype=np.int64).reshape(whole, PLACES).T

    def prompt(self, tokenizer: Any, text: str, voice: str | None = None) -> list[int]:
        """Tokens up to the first frame."""
        said = text if voice is None else f"{voice}: {text}"
        ids = tokenizer(said, add_special_tokens=True)["input_ids"]
        if ids and max(ids) >= self.text_vocabulary:
            raise SpeechRowInvalid(
                f"the text has token {max(ids)}, which is no text token",
                fix="leave audio tokens out of the text",
            )
        return [self.human, *ids, self.end_of_text, self.end_of_human, self.ai, self.speech]

    def row(
        self,
        tokenizer: Any,
        given: Mapping[str, Any],
        *,
        folder: Path | None = None,
        train_on_prompt: bool = False,
        codec: SnacCodec | None = None,
    ) -> dict[str, list[int]]:
        """`input_ids` and `labels` of a row {"text", "codes"}, and "voice" where the model has several.

        Args:
            given: "codes" are frames [7, F], SNAC's three lists (of lengths F, 2F, 4F), or the path of a .npy file of
                frames; or "audio" is the path of a WAV file.
            folder: what relative paths start from.
            train_on_prompt: learn the text, too, as the published models did.
            codec: for rows with audio; None: made from the package snac.

        Raises:
            SpeechRowInvalid: it is no such row.
            CodecMissing: it holds audio, and there is no codec.
        """
        text, voice = given.get("text"), given.get("voice")
        if not isinstance(text, str) or not text.strip():
            raise SpeechRowInvalid("a row has no text", fix='give {"text": ..., "codes": ...}')
        prompt = self.prompt(tokenizer, text, voice)
        answer = [*self.tokens(self._frames_of(given, folder, codec)), self.end_of_speech, self.end_of_ai]
        ids = prompt + answer
        return {"input_ids": ids, "labels": ids if train_on_prompt else [IGNORED] * len(prompt) + answer}

    def _frames_of(
        self, given: Mapping[str, Any], folder: Path | None, codec: SnacCodec | None
    ) -> np.ndarray:
        codes = given.get("codes")
        if codes is None:
            named = next((given[c] for c in AUDIO_COLUMNS if isinstance(given.get(c), str)), None)
            if named is None:
                raise SpeechRowInvalid(
                    "a row has neither codes nor audio", fix='give {"text": ..., "codes": ...}'
                )
            codes = (codec or _default_codec()).encode(Path(named) if folder is None else folder / named)
        if isinstance(codes, list) and len(codes) == len(_PER_FRAME):
            codes = frames_of_levels(codes)
        return read_codes(codes, PLACES, self.codebook_size, folder)


@lru_cache(maxsize=1)
def _default_codec() -> SnacCodec:
    """Loaded once, however many rows hold audio."""
    return SnacCodec()


def frames_of_levels(levels: Sequence[Sequence[int]]) -> np.ndarray:
    """SNAC's three lists of codes, of lengths F, 2F and 4F, as frames [7, F].

    Raises:
        SpeechRowInvalid: their lengths are others.
    """
    if not all(isinstance(level, list) for level in levels):
        raise SpeechRowInvalid("the codes are three numbers, no lists", fix="give F, 2F and 4F codes")
    count = len(levels[0])
    if [len(level) for level in levels] != [count * each for each in _PER_FRAME]:
        lengths = ", ".join(str(len(level)) for level in levels)
        raise SpeechRowInvalid(
            f"three levels of {lengths} codes are no frames", fix="give F, 2F and 4F codes"
        )
    arrays = [np.asarray(level) for level in levels]
    return np.stack([arrays[level][place :: _PER_FRAME[level]] for level, place in _LEVELS])


def levels_of_frames(frames: np.ndarray) -> list[list[int]]:
    """`frames_of_levels` undone: what SNAC decodes."""
    levels = [np.empty(frames.shape[1] * each, dtype=np.int64) for each in _PER_FRAME]
    for row, (level, place) in zip(frames, _LEVELS, strict=True):
        levels[level][place :: _PER_FRAME[level]] = row
    return [level.tolist() for level in levels]
