"""Generation: frame by frame with caches is what one pass over the whole row says; sampling keeps its rules."""

import numpy as np
import pytest
import torch

from pronghorn.errors import RequestTooLong, SamplingInvalid
from pronghorn.speech import Reference, Sampling, SpeechRows, generate_codes, load_speech
from pronghorn.speech.generate import GREEDY, draw, penalised
from tests.speech.tiny import BOOKS, CODES, LAYOUTS, random_codes, save_speech_tiny


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_speech(save_speech_tiny(tmp_path_factory.mktemp("speech")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_frames_are_the_most_likely_of_a_whole_pass(layout, tmp_path):
    model, tokenizer = load_speech(save_speech_tiny(tmp_path, layout), dtype=torch.float64)
    reference = Reference("Me.", random_codes(3, seed=2))
    with torch.no_grad():
        # A logit of 0, below the largest of 24 random ones: the model does not end at once.
        model.slow.lm_head.weight[tokenizer.end] = 0
    text, count = "Say it.", 6
    spoken = generate_codes(model, tokenizer, text, reference=reference, sampling=GREEDY, max_frames=count)
    assert spoken.shape == (BOOKS, count) and spoken.dtype == np.int64
    rows = SpeechRows(model.config, tokenizer)
    given = {"text": text, "codes": spoken, "reference_text": "Me.", "reference_codes": reference.codes}
    row = {name: torch.from_numpy(value)[None] for name, value in rows.row(given).items()}
    with torch.no_grad():
        output = model(**row, return_logits=True)
    first, last = tokenizer.semantic
    frames = output.token_logits[0, -count - 2 : -2, first : last + 1]
    assert frames.argmax(-1).tolist() == spoken[0].tolist()
    assert output.code_logits.argmax(-1)[:, 1:].T.tolist() == spoken[1:].tolist()


def test_draws_are_reproducible_and_differ_by_seed(loaded):
    model, tokenizer = loaded
    hot = {"temperature": 1.5, "top_p": 1.0, "top_k": 0}
    one, same, other = (
        generate_codes(model, tokenizer, "Say it.", sampling=Sampling(seed=s, **hot), max_frames=8)
        for s in (1, 1, 2)
    )
    assert one.tolist() == same.tolist() != other.tolist()
    assert one.min() >= 0 and one.max() < CODES


def test_greedy_is_the_same_after_training_mode(loaded):
    model, tokenizer = loaded
    model.train()
    one = generate_codes(model, tokenizer, "Say it.", sampling=GREEDY, max_frames=3)
    assert model.training
    model.eval()
    assert one.tolist() == generate_codes(model, tokenizer, "Say it.", sampling=GREEDY, max_frames=3).tolist()


def test_a_penalty_moves_codes_away():
    logits = torch.tensor([2.0, -1.0, 1.5])
    assert penalised(logits, [0, 1], 2.0).tolist() == [1.0, -2.0, 1.5]
    assert logits.tolist() == [2.0, -1.0, 1.5]


def shares(logits, **sampling):
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(torch.tensor(logits), generator=generator, **sampling) for _ in range(2000)]
    return np.bincount(drawn, minlength=len(logits)) / len(drawn)


def test_draws_follow_the_distribution():
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    # 2,000 draws: three standard deviations are 0.034.
    assert shares(logits, temperature=1.0, top_p=1.0, top_k=0) == pytest.approx(
        [0.5, 0.3, 0.15, 0.05], abs=0.035
    )
    # The plain distribution is cut where it crosses top_p, then cooled.
    assert shares(logits, temperature=0.5, top_p=0.85, top_k=0) == pytest.approx(
        [25 / 34, 9 / 34, 0, 0], abs=0.035
    )
    assert shares(logits, temperature=1.0, top_p=1.0, top_k=2) == pytest.approx(
        [0.625, 0.375, 0, 0], abs=0.035
    )
    assert shares(logits, temperature=1.0, top_p=0.1, top_k=0).tolist() == [1, 0, 0, 0]
    assert shares(logits, temperature=0, top_p=1.0, top_k=0).tolist() == [1, 0, 0, 0]


def test_a_prompt_without_room(loaded):
    model, tokenizer = loaded
    with pytest.raises(RequestTooLong, match="256 positions"):
        generate_codes(model, tokenizer, "a" * 300)


def test_frames_end_with_the_positions(loaded):
    model, tokenizer = loaded
    prompt = SpeechRows(model.config, tokenizer).prompt("a" * 60)
    room = 256 - len(prompt["input_ids"])
    tokenizer.end, kept = 0, tokenizer.end  # a model that never ends
    try:
        greedy = Sampling(temperature=0.0, repetition_penalty=1.3)
        assert generate_codes(model, tokenizer, "a" * 60, sampling=greedy).shape[1] <= room
    finally:
        tokenizer.end = kept


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"window": 0},
    ],
)
def test_values_outside_of_their_range(wrong):
    with pytest.raises(SamplingInvalid, match=next(iter(wrong))):
        Sampling(**wrong)
