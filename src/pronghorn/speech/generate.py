"""Codes of a text, frame by frame: the slow transformer gives the first code of a frame, the fast one the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from pronghorn.engine import base_causal_lm, evaluating
from pronghorn.errors import RequestTooLong, SamplingInvalid
from pronghorn.speech.model import DualARModel
from pronghorn.speech.orpheus import PLACES, OrpheusLayout
from pronghorn.speech.rows import Reference, SpeechRows
from pronghorn.speech.tokenizer import SpeechTokenizer

#: What a repeated semantic token is drawn again with.
_AGAIN_TEMPERATURE, _AGAIN_TOP_P = 1.0, 0.9


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn, by the order of the published models: penalty, top_p and top_k of the plain distribution,
    then temperature.

    Args:
        temperature: 0 takes the most likely code.
        top_p: the most likely codes that have this probability together.
        top_k: no more than so many; 0: all.
        repetition_penalty: of the last `window` frames' codes, codebook by codebook: logits divided by it (multiplied
            where negative).
        redraw: a semantic token that the last so many frames had is drawn once more, hotter; 0: never.
        seed: of all draws.

    Raises:
        SamplingInvalid: a value is outside of its range.
    """

    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 30
    repetition_penalty: float = 1.1
    window: int = 16
    redraw: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "temperature": self.temperature < 0,
            "top_p": not 0 < self.top_p <= 1,
            "top_k": self.top_k < 0,
            "repetition_penalty": self.repetition_penalty <= 0,
            "window": self.window < 1,
            "redraw": self.redraw < 0,
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise SamplingInvalid(
                    f"{name}={getattr(self, name)} is outside of its range", fix=f"leave {name} out"
                )


#: The most likely code everywhere.
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0, redraw=0)


@torch.no_grad()
def generate_codes(
    model: Any,
    tokenizer: SpeechTokenizer,
    text: str,
    *,
    reference: Reference | None = None,
    max_frames: int = 1024,
    sampling: Sampling | None = None,
) -> np.ndarray:
    """Codes int64 [K, frames] of a text, in a reference's voice where one is given; the codec's package makes sound of
    them. Ends where the model ends, after `max_frames`, or at the end of its positions.

    Raises:
        RequestTooLong: the prompt leaves no room for a frame.
        SpeechRowInvalid: the reference's codes are not this model's.
    """
    base: DualARModel = base_causal_lm(model)
    prompt = SpeechRows(base.config, tokenizer).prompt(text, reference)
    room = base.config.positions - len(prompt["input_ids"])
    if room < 1:
        raise RequestTooLong(
            f"the prompt has {len(prompt['input_ids'])} tokens, the model has {base.config.positions} positions",
            fix="speak the text in parts, or take a shorter reference",
        )
    with evaluating(model):
        frames = _Speaker(base, tokenizer, sampling or Sampling()).speak(prompt, min(max_frames, room))
    books = base.config.num_codebooks
    return np.asarray(frames, dtype=np.int64).T if frames else np.zeros((books, 0), dtype=np.int64)


@torch.no_grad()
def generate_frames(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    voice: str | None = None,
    max_frames: int = 300,
    sampling: Sampling | None = None,
) -> np.ndarray:
    """Frames int64 [7, F] that an Orpheus model speaks a text in.

    Of `sampling`, `window` and `redraw` are not used: the penalty is of all tokens, as Transformers applies it.
    """
    layout, sampling = OrpheusLayout.of(tokenizer), sampling or Sampling()
    prompt = torch.tensor([layout.prompt(tokenizer, text, voice)], device=model.device)
    drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature:
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        drawn = {"do_sample": True, **chosen}
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        answer = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_frames * PLACES + 1,
            eos_token_id=layout.end_of_speech,
            pad_token_id=layout.padding,
            repetition_penalty=sampling.repetition_penalty,
            use_cache=True,
            **drawn,
        )
    return layout.frames(answer[0, prompt.shape[1] :].tolist())[:, :max_frames]


class _Speaker:
    """One answer's state."""

    def __init__(self, model: DualARModel, tokenizer: SpeechTokenizer, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.device = model.device
        self.generator = torch.Generator(self.device).manual_seed(sampling.seed)
        self.frames: list[list[int]] = []
        allowed = torch.full((model.config.slow.vocab_size,), float("-inf"), device=self.device)
        first, last = tokenizer.semantic
        allowed[first : last + 1] = 0
        allowed[tokenizer.end] = 0
        self.allowed = allowed

    def speak(self, prompt: dict[str, np.ndarray], most: int) -> list[list[int]]:
        """Frames, each K codes, until the model ends or there are `most`."""
        first = self.tokenizer.semantic[0]
        cache = DynamicCache(config=self.model.config.slow)
        ids = torch.from_numpy(prompt["input_ids"])[None].to(self.device)
        codes = torch.from_numpy(prompt["codes"])[None].to(self.device)
        while len(self.frames) < most:
            embeddings = self.model.embed(ids, codes)
            normed, read = self.model.run_slow(embeddings, past_key_values=cache, use_cache=True)
            token = self._token(self.model.slow.lm_head(normed[:, -1])[0])
            if token == self.tokenizer.end:
                break
            start = self.model.fast_project_in(read[:, -1:])
            self.frames.append(self._frame(start, token - first))
            ids = torch.tensor([[token]], device=self.device)
            codes = torch.tensor(self.frames[-1], device=self.device)[None, :, None]
        return self.frames

    def _token(self, logits: Tensor) -> int:
        """The next semantic token, or the end."""
        sampling, first = self.sampling, self.tokenizer.semantic[0]
        logits = logits.float() + self.allowed
        before = [frame[0] + first for frame in self.frames]
        token = self._choose(logits, before)
        if sampling.temperature and sampling.redraw and token in before[-sampling.redraw :]:
            return draw(logits, _AGAIN_TEMPERATURE, _AGAIN_TOP_P, sampling.top_k, self.generator)
        return token

    def _frame(self, start: Tensor, first_code: int) -> list[int]:
        """A frame's codes from what the fast transformer starts with [1, 1, H'] and its first code."""
        fast = self.model.fast
        cache = DynamicCache(config=self.model.config.fast)
        fast.model(inputs_embeds=start, past_key_values=cache, use_cache=True)
        frame = [first_code]
        for book in range(1, self.model.config.num_codebooks):
            embedded = fast.get_input_embeddings()(torch.tensor([[frame[-1]]], device=self.device))
            output = fast.model(inputs_embeds=embedded.to(start.dtype), past_key_values=cache, use_cache=True)
            logits = fast.lm_head(output.last_hidden_state[:, -1])[0].float()
            frame.append(self._choose(logits, [each[book] for each in self.frames]))
        return frame

    def _choose(self, logits: Tensor, before: list[int]) -> int:
        sampling = self.sampling
        recent = sorted(set(before[-sampling.window :]))
        if recent and sampling.repetition_penalty != 1.0:
            logits = penalised(logits, recent, sampling.repetition_penalty)
        return draw(logits, sampling.temperature, sampling.top_p, sampling.top_k, self.generator)


def penalised(logits: Tensor, codes: list[int], penalty: float) -> Tensor:
    """Logits [V] with those of `codes` made less likely."""
    index = torch.tensor(codes, device=logits.device)
    chosen = logits[index]
    return logits.index_copy(0, index, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def draw(logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> int:
    """A code from logits [V]; with temperature 0 the most likely one."""
    if temperature == 0:
        return int(logits.argmax())
    ordered, codes = logits.sort(descending=True)
    # The code that crosses top_p goes as well, as in the published models; the most likely one stays in any case.
    out = ordered.softmax(0).cumsum(0) > top_p
    if top_k:
        out |= torch.arange(len(ordered), device=logits.device) >= top_k
    out[0] = False
    weights = (ordered.masked_fill(out, float("-inf")) / temperature).softmax(0)
    return int(codes[torch.multinomial(weights, 1, generator=generator)])
