"""Named chat templates: their renderings, their spans token by token, and how they are put on a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trl

from pronghorn.data.chat_templates import (
    TEMPLATES,
    find_template,
    get_chat_template,
    without_generation_blocks,
)
from pronghorn.data.rows import RowFormat, RowRenderer
from pronghorn.data.templates import ChatRenderer
from pronghorn.errors import ChatTemplateMismatch, RowInvalid, TokenizerProblem, UnknownArgument
from tests.data.chat_tokenizers import chat_tokenizer, family_of
from tests.tiny import tiny_model, tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi there?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "I am fine."},
]
CHAT = [SYSTEM, *TURNS]

#: The formats as their makers write them down, for CHAT.
PUBLISHED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there?<|im_end|>\n<|im_start|>assistant"
    "\nHello.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nI am fine.<|im_end|>\n",
    "llama-3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>"
    "user<|end_header_id|>\n\nHi there?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    "\n\nI am fine.<|eot_id|>",
    "llama-2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there? [/INST] Hello. </s><s>[INST] How are you? [/INST]"
    " I am fine. </s>",
    "gemma-3": "<bos><start_of_turn>user\nBe brief.\n\nHi there?<end_of_turn>\n<start_of_turn>model\nHello."
    "<end_of_turn>\n<start_of_turn>user\nHow are you?<end_of_turn>\n<start_of_turn>model\nI am fine.<end_of_turn>\n",
    "phi-3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi there?<|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\n"
    "How are you?<|end|>\n<|assistant|>\nI am fine.<|end|>\n<|endoftext|>",
    "phi-4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi there?<|im_end|><|im_start|>"
    "assistant<|im_sep|>Hello.<|im_end|><|im_start|>user<|im_sep|>How are you?<|im_end|><|im_start|>assistant<|im_sep|>"
    "I am fine.<|im_end|>",
    "mistral-v0.1": "<s> [INST] Be brief.\n\nHi there? [/INST] Hello.</s> [INST] How are you? [/INST] I am fine.</s>",
    "mistral-v0.3": "<s>[INST] Hi there?[/INST] Hello.</s>[INST] Be brief.\n\nHow are you?[/INST] I am fine.</s>",
    "mistral-nemo": "<s>[INST]Hi there?[/INST]Hello.</s>[INST]Be brief.\n\nHow are you?[/INST]I am fine.</s>",
    "mistral-small": "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi there?[/INST]Hello.</s>[INST]How are "
    "you?[/INST]I am fine.</s>",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHi there?\n\n### Response:\nHello.</s>\n\n### Instruction:\nHow are "
    "you?\n\n### Response:\nI am fine.</s>\n\n",
    "vicuna": "<s>Be brief. USER: Hi there? ASSISTANT: Hello.</s>USER: How are you? ASSISTANT: I am fine.</s>",
    "zephyr": "<s><|system|>\nBe brief.</s>\n<|user|>\nHi there?</s>\n<|assistant|>\nHello.</s>\n<|user|>\nHow are "
    "you?</s>\n<|assistant|>\nI am fine.</s>\n",
    "unsloth": "<s>Be brief.\n>>> User: Hi there?\n>>> Assistant: Hello.</s>\n>>> User: How are you?\n>>> Assistant: "
    "I am fine.</s>\n",
}
#: What begins a conversation without a system message.
OPENINGS = {
    "qwen-2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHi there?<|im_end|>\n<|im_start|>assistant\n",
    "qwen-3": "<|im_start|>user\nHi there?<|im_end|>\n<|im_start|>assistant\n",
    "llama-3.1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023"
    "\nToday Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi there?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nHi there?\n\n### Response:\n",
    "vicuna": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: Hi there? ASSISTANT:",
    "mistral-v0.1": "<s> [INST] Hi there? [/INST]",
    "gemma-2": "<bos><start_of_turn>user\nHi there?<end_of_turn>\n<start_of_turn>model\n",
}
#: Models' own templates, as TRL ships them.
OWN = {
    "llama-3": "llama3",
    "llama-3.1": "llama3_1",
    "llama-3.2": "llama3_2",
    "qwen-2.5": "qwen2_5",
    "qwen-3": "qwen3",
    "qwen-3-instruct": "qwen3_instruct_2507",
    "gemma-2": "gemma",
    "gemma-3": "gemma3",
    "phi-3": "phi3",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}},
                "required": ["place"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
WITH_TOOLS = [
    SYSTEM,
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "Sunny."},
    {"role": "assistant", "content": "It is sunny."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Welcome."},
]


def with_template(name: str, **arguments):
    return get_chat_template(chat_tokenizer(family_of(name)), name, **arguments)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_formats(name):
    assert ChatRenderer(with_template(name)).text(CHAT) == PUBLISHED[name]


@pytest.mark.parametrize("name", OPENINGS)
def test_openings(name):
    assert ChatRenderer(with_template(name)).text(TURNS[:1], ask=True) == OPENINGS[name]


def test_every_template_has_a_string_to_compare_with():
    assert set(TEMPLATES) == {*PUBLISHED, *OPENINGS, *OWN, "gemma", "llama-3.3"}


@pytest.mark.parametrize("name", OWN)
def test_same_text_as_the_models_own_template(name):
    """Turns, a system message, an open question, parts of text, thoughts, spaces, and tools where there are any."""
    path = Path(trl.__file__).parent / "chat_templates" / f"{OWN[name]}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of TRL has no {path.name}")
    own = path.read_text()
    spaced = [{**message, "content": f"  {message['content']} \n"} for message in TURNS]
    thinking = [
        *TURNS[:1], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello."}, *TURNS[2:3],
        {"role": "assistant", "content": "Fine.", "reasoning_content": "Let me see."},
    ]  # fmt: skip
    chats = [TURNS, TURNS[:1], TURNS[:2], TURNS[:3], spaced] + ([] if name == "gemma-2" else [CHAT, CHAT[:2]])
    if name.startswith("qwen"):
        chats += [thinking, thinking[:2], [*CHAT, SYSTEM]]
    ours, theirs = with_template(name), chat_tokenizer(family_of(name))
    theirs.chat_template = own
    theirs.eos_token = "<|endoftext|>" if name == "phi-3" else ours.eos_token
    fixed = {"date_string": "01 Jan 2025"} if name == "llama-3.2" else {}
    cases = [(chat, {}) for chat in chats]
    if TEMPLATES[name].tools:
        cases += [(WITH_TOOLS[:end], {"tools": tools}) for end in (2, 4, 5, 7) for tools in (None, TOOLS)]
        cases += [(TURNS, {"tools": TOOLS})]
    if name == "qwen-3":
        cases += [(TURNS[:3], {"enable_thinking": False})]
    for chat, arguments in cases:
        for ask in (False, True):
            expected = ChatRenderer(theirs, **fixed, **arguments).text(chat, ask=ask)
            assert ChatRenderer(ours, **fixed, **arguments).text(chat, ask=ask) == expected


# --- spans ------------------------------------------------------------------------------------------------------


def supervised_texts(tokenizer, messages, **arguments) -> list[str]:
    """Each stretch of supervised tokens as the text it stands for, from the tokens' own places in the text."""
    renderer = ChatRenderer(tokenizer, **arguments)
    text = renderer.text(messages)
    ids, mask = renderer.assistant_mask(messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ids == encoded["input_ids"]
    stretches, previous = [], False
    for (start, end), inside in zip(encoded["offset_mapping"], mask, strict=True):
        if inside and not previous:
            stretches.append([start, end])
        elif inside:
            stretches[-1][1] = end
        previous = inside
    return [text[start:end] for start, end in stretches]


def end_of(name: str, tokenizer) -> str:
    """What ends an answer: EOS, which the template's own end has become."""
    return (" " if name == "llama-2" else "") + tokenizer.eos_token


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", [TURNS, CHAT, CHAT[:3], CHAT[:4]], ids=["turns", "system", "one", "open"])
def test_exactly_the_answers_and_their_ends_are_supervised(name, chat):
    tokenizer = with_template(name)
    expected = [
        message["content"] + end_of(name, tokenizer) for message in chat if message["role"] == "assistant"
    ]
    if name == "qwen-3" and chat[-1]["role"] == "assistant":
        expected[-1] = f"<think>\n\n</think>\n\n{expected[-1]}"
    found = supervised_texts(tokenizer, chat)
    # Only the space in front of an answer may belong to it: "▁Hello" is one token.
    assert [text.removeprefix(" ") for text in found] == expected
    if name not in ("llama-2", "mistral-v0.1", "mistral-v0.3", "vicuna", "unsloth"):
        assert found == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_empty_answer_is_its_end_alone(name):
    tokenizer = with_template(name)
    chat = [TURNS[0], {"role": "assistant", "content": ""}, *TURNS[2:]]
    first, second = supervised_texts(tokenizer, chat)
    assert first.strip() == tokenizer.eos_token and first.strip(" ") == first.strip()
    assert second.endswith(f"I am fine.{end_of(name, tokenizer)}")


@pytest.mark.parametrize(
    "answer", ["  two spaces", "\nnewline first", "tail \n", "Ж€ end", "<s>?", "user\n"], ids=repr
)
@pytest.mark.parametrize(
    "name", ["chatml", "llama-3", "llama-2", "mistral-v0.3", "vicuna", "alpaca", "zephyr"]
)
def test_spans_where_an_answers_ends_merge_with_what_stands_there(name, answer):
    tokenizer = with_template(name)
    found = supervised_texts(tokenizer, [TURNS[0], {"role": "assistant", "content": answer}, *TURNS[2:]])
    assert len(found) == 2
    assert answer.strip() in found[0] and found[0].endswith(tokenizer.eos_token)
    # A token that merges with the space or newline before may bring that along, nothing else.
    assert found[0].partition(answer.strip())[0].strip() == ""
    assert found[0].partition(answer.strip())[2].strip() == tokenizer.eos_token


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if template.tools])
def test_tool_results_are_not_supervised_and_tool_calls_are(name):
    tokenizer = with_template(name)
    call, answer, last = supervised_texts(tokenizer, WITH_TOOLS, tools=TOOLS)
    assert '"weather"' in call and "Rome" in call and call.endswith(tokenizer.eos_token)
    assert "Sunny" not in call + answer + last
    assert "It is sunny." in answer and "Welcome." in last


def test_the_supervised_part_begins_where_the_generation_prompt_ends():
    for name in TEMPLATES:
        tokenizer = with_template(name)
        renderer = ChatRenderer(tokenizer)
        asked = renderer.text(TURNS[:3], ask=True)
        text = renderer.text(TURNS)
        if name == "qwen-3":  # the earlier answer is rendered alike, the last one with its empty thought
            assert text.startswith(asked)
        elif TEMPLATES[name].name != "mistral-v0.3":
            assert text.startswith(asked), name
        assert (
            supervised_texts(tokenizer, TURNS)[-1].strip()
            == text[len(asked) :].replace("<|endoftext|>", "").strip()
        )


def test_no_generation_blocks_and_the_same_text():
    for name in TEMPLATES:
        tokenizer = with_template(name)
        expected = ChatRenderer(tokenizer).text(CHAT)
        tokenizer.chat_template = without_generation_blocks(tokenizer.chat_template)
        assert "generation " not in tokenizer.chat_template.replace("add_generation_prompt", "")
        assert ChatRenderer(tokenizer).text(CHAT) == expected


# --- what a format has no place for -----------------------------------------------------------------------------


def test_roles_and_tools_without_a_place_are_refused():
    renderer = ChatRenderer(with_template("alpaca"))
    with pytest.raises(RowInvalid, match="alpaca has no place for the role tool"):
        renderer.text([*TURNS, {"role": "tool", "content": "x"}])
    with pytest.raises(RowInvalid, match="no place for tools"):
        renderer.text([TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}])
    with pytest.raises(RowInvalid, match="no place for tools"):
        renderer.with_arguments(tools=TOOLS).text(TURNS)
    for name in ("llama-2", "gemma", "mistral-v0.1", "mistral-nemo"):
        with pytest.raises(RowInvalid, match="take turns"):
            ChatRenderer(with_template(name)).text([TURNS[0], TURNS[0]])


def test_content_in_parts():
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there?"}]}
    ]
    for name in TEMPLATES:
        renderer = ChatRenderer(with_template(name))
        assert renderer.text(parts, ask=True) == renderer.text(TURNS[:1], ask=True)


# --- putting one on a tokenizer ---------------------------------------------------------------------------------


def test_names_that_people_write():
    tokenizer = chat_tokenizer("chatml")
    for name, expected in {
        "Qwen2.5": "qwen-2.5", "qwen25": "qwen-2.5", "qwen3": "qwen-3", "llama3": "llama-3", "llama-31": "llama-3.1",
        "gemma2": "gemma-2", "phi-35": "phi-3", "llama": "llama-2", "plain": "unsloth", "ChatML": "chatml",
    }.items():  # fmt: skip
        assert find_template(name, tokenizer).name == expected
    for family in ("mistral-v0.3", "mistral-nemo", "mistral-small"):
        assert find_template("mistral", chat_tokenizer(family)).name == family
    assert find_template("mistral", chat_tokenizer("llama-2")).name == "mistral-v0.1"
    with pytest.raises(UnknownArgument, match="did you mean 'llama-3"):
        find_template("llama-3.9", tokenizer)


def test_a_template_whose_tokens_are_missing_is_refused_with_the_difference():
    tokenizer = chat_tokenizer("llama-2")
    before = tokenizer.eos_token, tokenizer.chat_template, len(tokenizer)
    with pytest.raises(ChatTemplateMismatch) as caught:
        get_chat_template(tokenizer, "chatml", map_eos_token=False)
    message = str(caught.value)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"])
    assert len(pieces) > 3
    assert f"'<|im_end|>' becomes {len(pieces)} tokens ({' '.join(pieces)})" in message
    assert "PH306" in message and "vicuna" in message and "'<|im_start|>'" in message
    assert (tokenizer.eos_token, tokenizer.chat_template, len(tokenizer)) == before


def test_control_tokens_as_plain_text_end_with_the_tokenizers_eos(caplog):
    tokenizer = get_chat_template(chat_tokenizer("llama-2"), "chatml", missing_tokens="text")
    text = ChatRenderer(tokenizer).text(TURNS[:2])
    assert text == "<s><|im_start|>user\nHi there?</s>\n<|im_start|>assistant\nHello.</s>\n"
    assert "end with its EOS '</s>'" in caplog.text


def test_the_end_of_turn_becomes_eos():
    tokenizer = chat_tokenizer("llama-3")
    assert tokenizer.eos_token == "<|end_of_text|>"
    get_chat_template(tokenizer, "llama-3")
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_eos_stays_only_where_the_models_own_template_ends_so_too():
    tokenizer = chat_tokenizer("llama-3")
    with pytest.raises(ChatTemplateMismatch, match="generation would not stop"):
        get_chat_template(tokenizer, "llama-3", map_eos_token=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    get_chat_template(tokenizer, "llama-3", map_eos_token=False)
    assert tokenizer.eos_token == "<|end_of_text|>"
    assert ChatRenderer(tokenizer).text(CHAT) == PUBLISHED["llama-3"]


def test_missing_tokens_are_added_when_asked_for(caplog):
    tokenizer, model = tiny_tokenizer(chat_template=False), tiny_model("llama")
    weights = [
        module.weight.clone() for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    rows = len(tokenizer)
    with pytest.raises(ChatTemplateMismatch, match="give model="):
        get_chat_template(tokenizer, "phi-4", missing_tokens="add")
    get_chat_template(tokenizer, "phi-4", missing_tokens="add", model=model)
    assert tokenizer("<|im_sep|>", add_special_tokens=False)["input_ids"] == [
        tokenizer.convert_tokens_to_ids("<|im_sep|>")
    ]
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    known = tokenizer.convert_tokens_to_ids("<|im_sep|>")
    for module, before in zip(
        (model.get_input_embeddings(), model.get_output_embeddings()), weights, strict=True
    ):
        assert torch.equal(module.weight[:rows], before[:rows])
        assert torch.allclose(module.weight[known], before[:known].mean(0), atol=1e-6)
    assert tokenizer.eos_token == "<|im_end|>"
    assert "must be trained" in caplog.text


def test_new_tokens_are_refused_behind_an_adapter():
    import peft

    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ChatTemplateMismatch, match="adapter already"):
        get_chat_template(tiny_tokenizer(), "phi-4", missing_tokens="add", model=model)


def test_a_tokenizer_without_eos():
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    with pytest.raises(TokenizerProblem, match="no EOS"):
        get_chat_template(tokenizer, "vicuna")


def test_bos_only_where_the_tokenizer_puts_one():
    plain = get_chat_template(chat_tokenizer("llama-2", bos_first=False), "vicuna")
    assert not ChatRenderer(plain).text(TURNS).startswith("<s>")
    assert ChatRenderer(with_template("vicuna")).text(TURNS).startswith("<s>")


SHAREGPT = [{"from": "human", "value": "Hi there?"}, {"from": "gpt", "value": "Hello."}]
MAPPING = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_with_other_names(name):
    tokenizer = with_template(name, mapping=MAPPING)
    expected = ChatRenderer(with_template(name)).text(TURNS[:2])
    assert tokenizer.apply_chat_template(SHAREGPT, tokenize=False) == expected
    assert ChatRenderer(tokenizer).text(TURNS[:2]) == expected
    assert len(supervised_texts(tokenizer, SHAREGPT)) == 1


def test_a_mapping_with_an_unknown_key():
    with pytest.raises(UnknownArgument, match="'rol'"):
        with_template("chatml", mapping={"rol": "from"})


def test_a_system_message_of_ones_own():
    tokenizer = with_template("chatml", system_message='Say "yes" or {{ no }}.')
    assert (
        ChatRenderer(tokenizer)
        .text(TURNS[:1])
        .startswith('<|im_start|>system\nSay "yes" or {{ no }}.<|im_end|>\n')
    )
    assert ChatRenderer(tokenizer).text(CHAT) == PUBLISHED["chatml"]
    without = with_template("qwen-2.5", system_message="")
    assert ChatRenderer(without).text(TURNS[:1]).startswith("<|im_start|>user\n")


OWN_TEXT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_template_of_ones_own():
    tokenizer = get_chat_template(chat_tokenizer("chatml"), OWN_TEXT, mapping=MAPPING)
    assert tokenizer.eos_token == "<|im_end|>"
    assert ChatRenderer(tokenizer).text(CHAT) == PUBLISHED["chatml"]
    assert tokenizer.apply_chat_template(SHAREGPT, tokenize=False).endswith("assistant\nHello.<|im_end|>\n")
    assert supervised_texts(tokenizer, CHAT) == ["Hello.<|im_end|>", "I am fine.<|im_end|>"]
    with pytest.raises(ChatTemplateMismatch, match=r"'<\|im_start\|>' becomes"):
        get_chat_template(chat_tokenizer("llama-2"), (OWN_TEXT, "<|im_end|>"))
    mapped = get_chat_template(chat_tokenizer("llama-2"), (OWN_TEXT, "<|im_end|>"), missing_tokens="text")
    assert ChatRenderer(mapped).text(TURNS[:1]) == "<|im_start|>user\nHi there?</s>\n"


def test_wrong_arguments():
    with pytest.raises(UnknownArgument, match="missing_tokens"):
        with_template("chatml", missing_tokens="ignore")
    with pytest.raises(UnknownArgument, match="chat_template is int"):
        get_chat_template(chat_tokenizer("chatml"), 3)


# --- rows rendered to text first, as many scripts do ------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_of_rendered_text_has_the_tokens_of_its_chat(name):
    """No second BOS, no second EOS."""
    tokenizer = with_template(name)
    chat = RowRenderer(tokenizer, RowFormat())({"messages": CHAT})
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    rendered = RowRenderer(tokenizer, RowFormat())({"text": text})["input_ids"]
    # Phi-3 ends a text with another token than it ends answers with.
    assert rendered == chat["input_ids"] + ([tokenizer.eos_token_id] if name == "phi-3" else [])
