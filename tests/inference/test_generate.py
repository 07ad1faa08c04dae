"""Answers: repeatable, streamed in the same words, and a conversation that stays within its context."""

import pytest

from pronghorn.errors import RequestTooLong, TokenizerProblem
from pronghorn.inference import Conversation, Sampling, generate
from tests.tiny import tiny_model, tiny_tokenizer

QUESTION = [{"role": "user", "content": "What does it eat?"}]
SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_greedy_is_the_argmax_of_the_stock_forward(model, tokenizer):
    import torch

    ids = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids, start = ids["input_ids"], ids["input_ids"].shape[1]
    with torch.no_grad():
        for _ in range(SHORT.max_new_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    assert generate(model, tokenizer, QUESTION, SHORT) == expected


def test_streamed_pieces_are_the_answer(model, tokenizer):
    pieces = []
    answer = generate(model, tokenizer, QUESTION, SHORT, pieces.append)
    assert "".join(pieces).strip() == answer


def test_training_mode_is_put_back(tokenizer):
    model = tiny_model("llama").train()
    generate(model, tokenizer, QUESTION, Sampling(max_new_tokens=1))
    assert model.training


def test_sampling_uses_the_temperature(model, tokenizer):
    import torch

    hot = Sampling(max_new_tokens=16, temperature=5.0, top_p=1.0)
    answers = set()
    for seed in range(4):
        torch.manual_seed(seed)
        answers.add(generate(model, tokenizer, QUESTION, hot))
    assert len(answers) > 1


def test_no_chat_template(model):
    with pytest.raises(TokenizerProblem, match="chat template"):
        generate(model, tiny_tokenizer(chat_template=False), QUESTION, SHORT)


def test_a_conversation_forgets_its_oldest_turns(model, tokenizer):
    conversation = Conversation(model, tokenizer, max_length=160, system="Be short.", sampling=SHORT)
    for number in range(6):
        conversation.ask(f"Question number {number} about the pronghorn?")
        assert conversation.turns[-2]["content"].startswith(f"Question number {number}")
    assert 2 <= len(conversation.turns) < 12
    assert conversation.turns[0]["role"] == "user"
    assert conversation.forgotten == 6 - len(conversation.turns) // 2


def test_a_question_that_leaves_no_room_is_refused_and_nothing_is_forgotten_for_it(model, tokenizer):
    conversation = Conversation(model, tokenizer, max_length=64, sampling=SHORT)
    conversation.ask("Hello?")
    turns = list(conversation.turns)
    with pytest.raises(RequestTooLong, match="room for 64"):
        conversation.ask("long " * 60)
    assert (conversation.turns, conversation.forgotten) == (turns, 0)
    # An answer may be no longer than what a short context leaves.
    conversation = Conversation(model, tokenizer, max_length=32, sampling=Sampling(max_new_tokens=500))
    conversation.ask("Hello?")
    assert len(tokenizer(conversation.turns[1]["content"])["input_ids"]) <= 32


def test_an_interrupted_answer_leaves_no_question(model, tokenizer):
    conversation = Conversation(model, tokenizer, max_length=128, sampling=SHORT)

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Hello?", stop)
    assert conversation.turns == []
