"""Full fine-tuning through FastModel: every weight is trained, the embeddings with a smaller learning rate.

pronghorn run examples/dropin/full_finetuning.py
"""

from pathlib import Path

from datasets import load_dataset
from unsloth import FastModel, UnslothTrainer, UnslothTrainingArguments

model, tokenizer = FastModel.from_pretrained(
    model_name="unsloth/SmolLM2-135M",
    max_seq_length=256,
    load_in_4bit=False,
    load_in_8bit=False,
    full_finetuning=True,
)
dataset = load_dataset("json", data_files=str(Path(__file__).with_name("questions.jsonl")), split="train")
trainer = UnslothTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    args=UnslothTrainingArguments(
        per_device_train_batch_size=8,
        max_steps=8,
        learning_rate=1e-3,
        embedding_learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        output_dir="outputs/dropin/full_finetuning",
        save_strategy="no",
        report_to="none",
    ),
)
trainer_stats = trainer.train()
for group in trainer.optimizer.param_groups:
    print(f"{sum(p.numel() for p in group['params']):>12,} weights at {group['lr']:.0e}")
