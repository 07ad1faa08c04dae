"""Rows sorted into buckets by length with `dataset.map`, and the batches made of rows of one bucket.

pronghorn run examples/dropin/buckets.py
"""

from collections import Counter
from pathlib import Path

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

BUCKETS = (32, 48, 64, 96, 128, 256)

model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-1B", max_seq_length=256)
model = FastLanguageModel.get_peft_model(model, r=16)


def to_text(row):
    return {"text": f"{row['instruction']}\n{row['input']}\n{row['output']}{tokenizer.eos_token}"}


def add_bucket(row):
    length = len(tokenizer(row["text"])["input_ids"])
    return {"length": length, "bucket": next(limit for limit in BUCKETS if length <= limit)}


dataset = load_dataset("json", data_files=str(Path(__file__).with_name("questions.jsonl")), split="train")
dataset = dataset.map(to_text).map(add_bucket, num_proc=2).sort("bucket")
counts = Counter(dataset["bucket"])
for limit in sorted(counts):
    print(f"up to {limit:3} tokens: {counts[limit]} rows")

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    args=SFTConfig(
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=1e-3,
        logging_steps=1,
        output_dir="outputs/dropin/buckets",
        save_strategy="no",
        report_to="none",
    ),
)
trainer_stats = trainer.train()
