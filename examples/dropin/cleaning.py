"""Rows as they come: without empty answers, stray spaces and repetitions they are fit to train on.

pronghorn run examples/dropin/cleaning.py
"""

from pathlib import Path

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

dataset = load_dataset("json", data_files=str(Path(__file__).with_name("messy.jsonl")), split="train")
before = len(dataset)

dataset = dataset.map(lambda row: {name: text.strip() for name, text in row.items()})
dataset = dataset.filter(lambda row: len(row["output"]) > 0)
seen = set()


def is_new(row):
    key = (row["instruction"].lower(), row["input"].lower())
    if key in seen:
        return False
    seen.add(key)
    return True


dataset = dataset.filter(is_new)
print(f"{before} rows, {len(dataset)} after cleaning")

model, tokenizer = FastLanguageModel.from_pretrained("unsloth/mistral-7b-bnb-4bit", max_seq_length=256)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)


def formatting_func(row):
    return f"### Task: {row['instruction']} {row['input']}\n### Answer: {row['output']}{tokenizer.eos_token}"


trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    formatting_func=formatting_func,
    packing=True,
    max_seq_length=256,
    args=SFTConfig(
        per_device_train_batch_size=2,
        max_steps=8,
        learning_rate=1e-3,
        logging_steps=1,
        output_dir="outputs/dropin/cleaning",
        save_strategy="no",
        report_to="none",
    ),
)
trainer_stats = trainer.train()
