"""Rows of text and codes to what `DualARModel` reads: tokens, and a frame's codes under every semantic token.

    <|im_start|>system⏎ how to speak [a voice to speak in: its text and frames] <|im_end|>⏎
    <|im_start|>user⏎ text <|im_end|>⏎
    <|im_start|>assistant⏎<|voice|> frames <|im_end|>

The frames and the end behind them are learned. Parts are tokenised one by one, as the model has seen them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pronghorn.data.reading import RowFile
from pronghorn.data.tokens import IGNORED
from pronghorn.errors import PronghornError, SpeechRowInvalid
from pronghorn.speech.codec import refuse_audio
from pronghorn.speech.codes import read_codes
from pronghorn.speech.layout import DualARConfig
from pronghorn.speech.tokenizer import END, START, VOICE, SpeechTokenizer

#: What the published models were told; other words would be a prompt that they do not know.
_PLAIN = "convert the provided text to speech"
_LIKE, _SPEECH = "convert the provided text to speech reference to the following:\n\nText:\n", "\n\nSpeech:\n"


@dataclass(frozen=True)
class Reference:
    """A voice to speak in: what was said, and its codes [K, frames]."""

    text: str
    codes: np.ndarray


@dataclass(frozen=True)
class SpeechRows:
    """Makes rows for one model.

    Args:
        folder: what relative paths of .npy files start from.
    """

    config: DualARConfig
    tokenizer: SpeechTokenizer
    folder: Path | None = None

    def row(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """`input_ids` and `labels` [T] and `codes` [K, T] (0 where there is no frame) of a row {"text", "codes"}, with
        "reference_text" and "reference_codes" where it is spoken in a voice.

        Raises:
            SpeechRowInvalid: it is no such row, or its codes are not this model's.
            CodecMissing: it holds audio instead of codes.
            RequestTooLong: it has more tokens than the model has positions.
        """
        text = given.get("text")
        if not isinstance(text, str) or not text.strip():
            raise SpeechRowInvalid("a row has no text", fix='give {"text": ..., "codes": ...}')
        if given.get("codes") is None:
            refuse_audio(given)
            raise SpeechRowInvalid("a row has no codes", fix='give {"text": ..., "codes": [[...], ...]}')
        prompt = self.prompt(text, self._reference(given))
        frames = self.codes(given["codes"])
        answer = _Parts(self).frames(frames).text(END).done()
        row = {
            "input_ids": np.concatenate([prompt["input_ids"], answer["input_ids"]]),
            "codes": np.concatenate([prompt["codes"], answer["codes"]], axis=1),
        }
        row["labels"] = row["input_ids"].copy()
        row["labels"][: len(prompt["input_ids"])] = IGNORED
        if len(row["input_ids"]) > self.config.positions:
            raise SpeechRowInvalid(
                f"the row has {len(row['input_ids'])} tokens, the model has {self.config.positions} positions",
                fix="cut the recording into shorter ones",
            )
        return row

    def prompt(self, text: str, reference: Reference | None = None) -> dict[str, np.ndarray]:
        """What stands in front of the frames of a text: `input_ids` [T] and `codes` [K, T]."""
        parts = _Parts(self).text(f"{START}system\n")
        if reference is None:
            parts.text(_PLAIN)
        else:
            spoken = reference.text if "<|speaker:" in reference.text else f"<|speaker:0|>{reference.text}"
            parts.text(_LIKE).text(spoken).text(_SPEECH).frames(self.codes(reference.codes))
        parts.text(f"{END}\n").text(f"{START}user\n").text(text).text(f"{END}\n")
        return parts.text(f"{START}assistant\n{VOICE}").done()

    def codes(self, value: Any) -> np.ndarray:
        """This model's codes [K, frames] from lists, an array or the path of a .npy file."""
        first, last = self.tokenizer.semantic
        config = self.config
        return read_codes(value, config.num_codebooks, config.codebook_size, self.folder, last - first + 1)

    def _reference(self, given: Mapping[str, Any]) -> Reference | None:
        text, codes = given.get("reference_text"), given.get("reference_codes")
        if text is None and codes is None:
            return None
        if not isinstance(text, str) or codes is None:
            raise SpeechRowInvalid(
                "a reference is a text and its codes, one of which is missing",
                fix="give reference_text and reference_codes, or neither",
            )
        return Reference(text, self.codes(codes))


class _Parts:
    """A row as it grows."""

    def __init__(self, rows: SpeechRows) -> None:
        self.rows = rows
        self.ids: list[np.ndarray] = []
        self.codes: list[np.ndarray] = []

    def text(self, text: str) -> _Parts:
        ids = np.asarray(self.rows.tokenizer.encode(text), dtype=np.int64)
        self.ids.append(ids)
        self.codes.append(np.zeros((self.rows.config.num_codebooks, len(ids)), dtype=np.int64))
        return self

    def frames(self, codes: np.ndarray) -> _Parts:
        self.ids.append(codes[0] + self.rows.tokenizer.semantic[0])
        self.codes.append(codes)
        return self

    def done(self) -> dict[str, np.ndarray]:
        return {"input_ids": np.concatenate(self.ids), "codes": np.concatenate(self.codes, axis=1)}


def given_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file, each with the place it stands at.

    Raises:
        SpeechRowInvalid: for a line that is broken, or no object.
        CommandMisused: there is no such file.
    """
    file = RowFile(path)
    for record in file.records():
        where = record.place(str(path))
        if record.problem is not None or not isinstance(record.value, dict):
            what = "no object" if record.problem is None else record.problem.what
            raise SpeechRowInvalid(
                f"this line is no row: {what}", where=where, fix='write {"text": ..., "codes": ...}'
            )
        yield where, record.value


def read_rows(path: str | Path, make: Any) -> list[Any]:
    """`make` of every row of a file; what it refuses is raised with the row's place.

    Raises:
        SpeechRowInvalid: as `make` does; and for a file without rows.
    """
    made = []
    for where, given in given_rows(path):
        try:
            made.append(make(given))
        except PronghornError as error:
            error.where = error.where or where
            raise
    if not made:
        raise SpeechRowInvalid("there are no rows", where=str(path), fix="name another file")
    return made


def frames_of(rows: Iterable[Mapping[str, np.ndarray]], semantic: Sequence[int]) -> int:
    """Frames that are learned in rows."""
    first, last = semantic
    return sum(int(((row["labels"] >= first) & (row["labels"] <= last)).sum()) for row in rows)
