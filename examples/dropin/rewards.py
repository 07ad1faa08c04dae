"""A reward for numbers in answers: TRL's GRPO on a model with an adapter. Answers come from Transformers' generate.

pronghorn run examples/dropin/rewards.py
"""

import re
from pathlib import Path

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Qwen3-0.6B",
    max_seq_length=128,
    load_in_4bit=False,
    fast_inference=True,
    max_lora_rank=16,
    gpu_memory_utilization=0.6,
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, use_gradient_checkpointing="unsloth")


def has_digits(completions, **kwargs):
    return [float(len(re.findall(r"\d", answer[0]["content"]))) for answer in completions]


def is_short(completions, **kwargs):
    return [-0.01 * len(answer[0]["content"]) for answer in completions]


dataset = load_dataset("json", data_files=str(Path(__file__).with_name("questions.jsonl")), split="train")
dataset = dataset.map(
    lambda row: {"prompt": [{"role": "user", "content": f"{row['instruction']} {row['input']}"}]},
    remove_columns=dataset.column_names,
)

trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[has_digits, is_short],
    args=GRPOConfig(
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        num_generations=4,
        max_prompt_length=64,
        max_completion_length=12,
        temperature=1.0,
        max_steps=2,
        logging_steps=1,
        optim="adamw_8bit",
        output_dir="outputs/dropin/rewards",
        report_to="none",
    ),
    train_dataset=dataset,
)
trainer.train()
model.save_lora("outputs/dropin/rewards/lora_model")
