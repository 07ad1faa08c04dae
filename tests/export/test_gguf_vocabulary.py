"""The vocabulary of a GGUF file and the Modelfile beside it: how llama.cpp cuts text, and what Ollama renders."""

import pytest
from gguf import TokenType
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from pronghorn.errors import NotExportable
from pronghorn.export import save_gguf
from pronghorn.export.gguf.modelfile import modelfile, read_turns
from pronghorn.export.gguf.vocabulary import PRE_TOKENIZERS, pre_tokenizer_name, read_vocabulary
from tests.export.test_gguf_export import export, fields
from tests.export.test_merged import trained
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    with pytest.raises(NotExportable, match=r"320|tokens and the model embeds 256"):
        export(tiny_model("llama", vocab_size=256), tmp_path / "out")


DIGITS = {"type": "Digits", "individual_digits": True}
WORDS = {"type": "ByteLevel", "use_regex": True}
NO_WORDS = {"type": "ByteLevel", "use_regex": False}
#: How texts are cut, whether words that are tokens are taken whole, and llama.cpp's name of that.
CUTS = {
    "gpt-2": ([WORDS], False),
    "smollm": ([DIGITS, WORDS], False),
    **{
        name: ([{"type": "Split", "pattern": {"Regex": pattern[0]}}, NO_WORDS], name == "llama-bpe")
        for pattern, name in PRE_TOKENIZERS.items()
        if name not in ("gpt-2", "smollm")
    },
}
CUTS["dbrx"] = (CUTS["llama-bpe"][0], False)


@pytest.mark.parametrize("name", CUTS)
def test_how_words_are_cut_has_llama_cpps_name(tmp_path, name):
    """Trained on text whose words hold figures, capitals and endings; llama.cpp's tokens are compared by the gate."""
    steps, whole = CUTS[name]
    described = {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {"ignore_merges": whole},
    }
    assert pre_tokenizer_name(described) == name
    cuts = [
        pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "isolated")
        if step["type"] == "Split"
        else pre_tokenizers.Digits(individual_digits=True)
        if step["type"] == "Digits"
        else pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"])
        for step in steps
    ]
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    texts = [
        "In 2026 HTTPServer's 123456 camelCase words don't\n\n  match 1,234.50 /* x */",
        "We'll see: ABCdef 77",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    model = tiny_model("qwen2", vocab_size=420)
    done = save_gguf(model, tokenizer, tmp_path / "out", "f32", held_out=texts)
    assert fields(done.files[0])["tokenizer.ggml.pre"] == name and done.checks[0].passed


def test_a_way_of_cutting_words_that_llama_cpp_has_no_name_for_is_refused():
    with pytest.raises(NotExportable, match="Whitespace"):
        pre_tokenizer_name({"pre_tokenizer": {"type": "Whitespace"}})


def sentencepiece_like(prefix):
    """As Llama 2's: bytes, single letters, then merges in order; a space is the letter below. Gemma's puts none before
    a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz."]
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("\u2581", "the"),
        ("a", "n"),
        ("\u2581", "t"),
        ("an", "t"),
        ("t", "e"),
    ]
    vocab = {piece: index for index, piece in enumerate([*pieces, *letters])}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    begin = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_has_scores_in_the_order_of_its_merges(tmp_path, prefix):
    tokenizer = sentencepiece_like(prefix)
    found = read_vocabulary(tokenizer, 320)
    assert found.model == "llama" and found.space_prefix is prefix and not found.merges
    index = {token: place for place, token in enumerate(found.tokens)}
    order = sorted(
        ("th", "the", "\u2581the", "an", "\u2581t", "ant", "te"), key=lambda t: -found.scores[index[t]]
    )
    assert order == ["th", "the", "\u2581the", "an", "\u2581t", "ant", "te"]
    kinds = [found.types[place] for place in (0, 1, 3, index["the"], 319)]
    assert kinds == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.BYTE,
        TokenType.NORMAL,
        TokenType.UNUSED,
    ]
    texts = ["the ant and the tea", "antennae there.", "a 7 \u00e9"]
    done = save_gguf(tiny_model("llama"), tokenizer, tmp_path / "out", "f32", held_out=texts)
    assert done.checks[0].passed  # with llama.cpp, its token ids are compared, too


LLAMA_3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|stop|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHAT_TEMPLATE
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system') }}{% else %}{{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template, expected",
    [
        (
            CHAT_TEMPLATE,
            'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n'
            '{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"""',
        ),
        (DEFAULT_SYSTEM, 'SYSTEM """Be kind."""'),
        (MISTRAL, None),
    ],
)
def test_the_modelfiles_template_renders_as_the_chat_template(template, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    text = modelfile(tokenizer, "m.Q8_0.gguf")
    assert text.startswith("FROM ./m.Q8_0.gguf\n")
    if expected is None:
        assert "TEMPLATE" not in text and read_turns(tokenizer) is None
        return
    assert expected in text and 'PARAMETER stop "' in text
    turns = read_turns(tokenizer)
    messages = [
        {"role": "system", "content": "Hm."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Well?"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # This tokenizer does not begin with BOS, so that llama.cpp will not: it stays in the template.
    assert rendered == turns.render("Hm.", [("Hi", "Ho")], "Well?")


def test_bos_is_left_out_of_the_modelfile_where_llama_cpp_adds_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = LLAMA_3_TEMPLATE
    # A BOS that only the first turn has is not in Ollama's form of a template.
    assert "TEMPLATE" not in modelfile(tokenizer, "m.gguf")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
    )
    text = modelfile(tokenizer, "m.gguf")
    assert "{{ if .System }}<|start|>system" in text and "<|begin|>" not in text
    assert "{{ .Prompt }}<|eot|><|start|>assistant<|stop|>\n\n{{ .Response }}<|eot|>" in text


def test_a_tokenizer_that_begins_with_bos_and_a_long_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]),
        ]
    )
    tokenizer.chat_template = "{{ bos_token }}" + "Be kind. " * 80 + CHAT_TEMPLATE
    done = save_gguf(
        trained(tiny_model("llama", max_position_embeddings=2048)), tokenizer, tmp_path / "out", "f32"
    )
    assert done.checks[0].passed and fields(done.files[0])["tokenizer.ggml.add_bos_token"] is True
