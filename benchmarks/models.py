"""Architectures of public checkpoints, written out, and checkpoints of random weights made from them.

Random weights train at the speed of real ones and need no download. A checkpoint is written once and each library
loads it through its own `from_pretrained`.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}

_SPECIAL = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}

#: name -> keyword arguments of the Transformers config class of its `model_type`
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "gemma-3-4b": {  # its text model
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
}


def with_layers(name: str, layers: int) -> str:
    """The name of the same architecture with so many layers, which this process knows from now on."""
    changed = f"{name}-{layers}-layers"
    CONFIGS.setdefault(changed, {**CONFIGS[name], "num_hidden_layers": layers})
    return changed


def find_model(name: str) -> str:
    """The name itself, of a known architecture or of one "with N layers", such as llama-3.1-8b-4-layers.

    Raises:
        SystemExit: for another one, with the known ones.
    """
    found = re.fullmatch(r"(.+)-(\d+)-layers", name)
    if name not in CONFIGS and found is not None and found[1] in CONFIGS:
        return with_layers(found[1], int(found[2]))
    if name not in CONFIGS:
        raise SystemExit(f"unknown: {name}; known: {', '.join(CONFIGS)}, and such as tiny-1-layers")
    return name


#: a quarter of the layers: 16 GB, where all of them take longer to write and to load than to time
with_layers("qwen3-30b-a3b", 12)

#: written last: a checkpoint with this file is whole
INDEX = "model.safetensors.index.json"

#: ids below this one are special tokens and never appear in benchmark rows
FIRST_TOKEN = 16


def model_config(name: str, **changes: Any) -> Any:
    """The Transformers config of a named architecture."""
    from transformers import AutoConfig

    keywords = {**CONFIGS[name], **_SPECIAL, "dtype": "bfloat16", **changes}
    return AutoConfig.for_model(keywords.pop("model_type"), **keywords)


def benchmark_tokenizer() -> Any:
    """A byte-level tokenizer with the usual special tokens; rows are tokenised already, so it only has to load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    special += [f"<|reserved_special_token_{i}|>" for i in range(FIRST_TOKEN - len(special))]
    vocabulary = {token: index for index, token in enumerate(special)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
    )
    fast.add_special_tokens({"additional_special_tokens": special[4:]})
    fast.chat_template = (
        "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    return fast


def write_checkpoint(name: str, folder: str | Path, *, seed: int = 0, shard_bytes: int = 4 << 30) -> Path:
    """Write a checkpoint of random bf16 weights: matrices N(0, 0.02²), norms by 1, biases N(0, 0.02²).

    Weights are drawn on the GPU where there is one. A folder with a finished checkpoint is left as it is.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    index_file = folder / INDEX
    if index_file.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    shard: dict[str, torch.Tensor] = {}
    filled, total, weight_map = 0, 0, {}

    def write() -> None:  # each as soon as it is full: a checkpoint may be larger than half of the memory
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for key, parameter in model.named_parameters():  # tied weights come once, under the embedding's name
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if key.endswith("norm.weight"):
            tensor.fill_(
                0.0 if config.model_type.startswith("gemma") else 1.0
            )  # Gemma's norms multiply by 1 + w
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > shard_bytes:
            write()
            filled = 0
        shard[key] = tensor.cpu()
        filled, total = filled + size, total + size
    write()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig(**_SPECIAL).save_pretrained(folder)
    benchmark_tokenizer().save_pretrained(folder)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    temporary = index_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(index))
    temporary.replace(index_file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=write_checkpoint.__doc__)
    parser.add_argument("name", type=find_model, help=f"{', '.join(CONFIGS)}, or such as tiny-1-layers")
    parser.add_argument("folder")
    arguments = parser.parse_args()
    started = time.time()
    folder = write_checkpoint(arguments.name, arguments.folder)
    print(f"{folder}: ready in {time.time() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
