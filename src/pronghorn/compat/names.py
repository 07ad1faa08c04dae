"""Which names a script may import, and what of this library answers to each.

A name's home is "module:attribute"; it is imported when the script asks for it.
"""

from __future__ import annotations

_MODELS = "pronghorn.compat.models"
_TRAINER = "pronghorn.compat.trainer"
_ARGUMENTS = "pronghorn.compat.arguments"
_TEMPLATES = {
    "apply_chat_template": "pronghorn.compat.sharegpt:apply_chat_template",
    "CHAT_TEMPLATES": "pronghorn.data.chat_templates:TEMPLATES",
    "get_chat_template": "pronghorn.data.chat_templates:get_chat_template",
    "standardize_data_formats": "pronghorn.data.sharegpt:standardize_data_formats",
    "standardize_sharegpt": "pronghorn.data.sharegpt:standardize_sharegpt",
    "to_sharegpt": "pronghorn.compat.sharegpt:to_sharegpt",
    "train_on_responses_only": "pronghorn.training:train_on_responses_only",
}
_LOADERS = {
    name: f"{_MODELS}:{name}"
    for name in ("FastLanguageModel", "FastModel", "FastTextModel", "FastVisionModel", "UnslothModel")
}
_FAMILIES = {
    f"Fast{family}Model": f"{_MODELS}:FastLanguageModel" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
_PRECISION = dict.fromkeys(
    ("is_bf16_supported", "is_bfloat16_supported"), "pronghorn.loading:is_bfloat16_supported"
)
_TRAINERS = {
    "UnslothTrainingArguments": f"{_ARGUMENTS}:UnslothTrainingArguments",
    **{
        name: f"{_TRAINER}:{name}"
        for name in ("UnslothTrainer", "UnslothVisionDataCollator", "unsloth_train")
    },
}
#: What patched TRL once: its trainers take a bound model as they are.
_PATCHES = dict.fromkeys(
    ("PatchDPOTrainer", "PatchFastRL", "PatchKTOTrainer"), f"{_TRAINER}:nothing_to_patch"
)
_KERNELS = {"fast_linear_forward": "pronghorn.kernels:fast_linear_forward"}
_TOKENS = {"add_new_tokens": "pronghorn.compat.tokens:add_new_tokens"}
_VLLM = {"SamplingParams": "pronghorn.compat.answers:SamplingParams"}

#: Whole modules that are ours: module -> name -> home.
MODULES: dict[str, dict[str, str]] = {
    "unsloth": {
        "__version__": "pronghorn:__version__",
        **_LOADERS,
        **_FAMILIES,
        **_PRECISION,
        **_TRAINERS,
        **_PATCHES,
        **_TEMPLATES,
        "add_new_tokens": _TOKENS["add_new_tokens"],
        "vLLMSamplingParams": _VLLM["SamplingParams"],
    },
    "unsloth.chat_templates": _TEMPLATES,
    "unsloth.kernels": _KERNELS,
    "unsloth.kernels.utils": _KERNELS,
    "unsloth.models": {**_LOADERS, **_FAMILIES, **_PRECISION},
    "unsloth.models.dpo": _PATCHES,
    "unsloth.models.loader": _LOADERS,
    "unsloth.save": {"unsloth_save_model": "pronghorn.compat.generation:unsloth_save_model"},
    "unsloth.tokenizer_utils": _TOKENS,
    "unsloth.trainer": _TRAINERS,
    "unsloth_zoo": {"__version__": "pronghorn:__version__"},
    "unsloth_zoo.tokenizer_utils": _TOKENS,
    "unsloth_zoo.utils": {"Version": "packaging.version:Version"},
    "unsloth_zoo.dataset_utils": {
        name: _TEMPLATES[name] for name in ("standardize_data_formats", "train_on_responses_only")
    },
    "vllm": _VLLM,
    "vllm.lora": {},
    "vllm.lora.request": {"LoRARequest": "pronghorn.compat.lora_requests:LoRARequest"},
    "vllm.sampling_params": _VLLM,
    "unsloth_zoo.vision_utils": {"UnslothVisionDataCollator": _TRAINERS["UnslothVisionDataCollator"]},
}

#: Names of Unsloth's, of modules too, that have no counterpart -> what to do instead.
INSTEAD = {
    "create_locked_down_function": "run what the model writes in a process of its own, such as subprocess.run([...], "
    "timeout=10), on a machine that has nothing to lose",
    "execute_with_time_limit": "run what the model writes in a process of its own, such as subprocess.run([...], "
    "timeout=10)",
    "create_ollama_modelfile": "model.save_pretrained_gguf, which writes a Modelfile beside its files",
    "dataprep": "pronghorn data synthesize, which makes rows out of documents",
    "FastSentenceTransformer": "pronghorn embed train, or pronghorn.embedding",
    "LLM": "FastLanguageModel.from_pretrained, and model.fast_generate(prompts, sampling_params)",
}

#: Real modules of which a script sees a few names of ours, and everything else as it is.
REPLACED: dict[str, dict[str, str]] = {
    "trl": {"SFTConfig": f"{_ARGUMENTS}:SFTConfig", "SFTTrainer": f"{_TRAINER}:ScriptTrainer"},
    "transformers": {
        "Trainer": f"{_TRAINER}:PlainTrainer",
        "TrainingArguments": f"{_ARGUMENTS}:TrainingArguments",
    },
}

#: As REPLACED, but found when a script asks: TRL's own classes with what older versions took.
LATER: dict[str, dict[str, str]] = {
    "trl": {"DataCollatorForCompletionOnlyLM": f"{_TRAINER}:DataCollatorForCompletionOnlyLM"}
    | {
        f"{method}{kind}": f"pronghorn.compat.preference:{method}{kind}"
        for method in ("CPO", "DPO", "GRPO", "KTO", "ORPO", "Reward")
        for kind in ("Config", "Trainer")
    }
}
