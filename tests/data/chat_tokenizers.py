"""Small tokenizers with the control tokens of the well-known chat formats."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_TEXT = [
    "Hello there, how are you? I am fine. user assistant system model",
    "[INST] ### Response: USER: \n\n",
]

#: control tokens, BOS, EOS, and whether words carry their space as Llama 2's do ("▁word").
FAMILIES: dict[str, tuple[list[str], str | None, str, bool]] = {
    "chatml": (["<|im_start|>", "<|im_end|>", "<think>", "</think>"], None, "<|endoftext|>", False),
    "llama-3": (
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|end_of_text|>",
        False,
    ),
    "llama-2": ([], "<s>", "</s>", True),
    "gemma": (["<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", True),
    "phi-3": (["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], None, "<|endoftext|>", True),
    "phi-4": (["<|im_start|>", "<|im_sep|>", "<|im_end|>"], None, "<|endoftext|>", False),
    "mistral-v0.3": (["[INST]", "[/INST]"], "<s>", "</s>", True),
    "mistral-nemo": (["[INST]", "[/INST]"], "<s>", "</s>", False),
    "mistral-small": (["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"], "<s>", "</s>", False),
}
_FAMILY_OF = {
    "qwen-2.5": "chatml",
    "qwen-3": "chatml",
    "qwen-3-instruct": "chatml",
    "gemma-2": "gemma",
    "gemma-3": "gemma",
    "mistral-v0.1": "llama-2",
    "alpaca": "llama-2",
    "vicuna": "llama-2",
    "zephyr": "llama-2",
    "unsloth": "llama-2",
}


def family_of(template: str) -> str:
    """The tokenizer of the models that speak a format."""
    return _FAMILY_OF.get(template, "llama-3" if template.startswith("llama-3") else template)


@cache
def _trained(family: str) -> tuple[str, tuple[str, ...]]:
    control, bos, eos, spaces = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=spaces))
    special = [token for token in (bos, eos, *control) if token]
    if spaces:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁", "Ж"]
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT * 3, trainer)
    if spaces:  # merges never end with a space, as in Llama's vocabulary, and text is not cut at spaces
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer.to_str(), tuple(special)


def chat_tokenizer(family: str, *, bos_first: bool = True) -> PreTrainedTokenizerFast:
    """A new tokenizer of a family; with `bos_first` it puts BOS before any text, as those with a BOS do."""
    control, bos, eos, _ = FAMILIES[family]
    core = Tokenizer.from_str(_trained(family)[0])
    core.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (bos, eos, *control) if t]
    )
    if bos is not None and bos_first:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, **({"bos_token": bos} if bos else {})
    )
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    return tokenizer
