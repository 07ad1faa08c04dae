"""The learning rate found by a range test on the run's own model and rows, then a run with it.

pronghorn run examples/dropin/best_learning_rate.py
"""

from pathlib import Path

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/Llama-3.2-1B", max_seq_length=256, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, random_state=3407)

trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=load_dataset(
        "json", data_files=str(Path(__file__).with_name("questions.jsonl")), split="train"
    ),
    args=SFTConfig(
        per_device_train_batch_size=8,
        max_steps=16,
        lr_scheduler_type="linear",
        logging_steps=1,
        seed=3407,
        output_dir="outputs/dropin/best_learning_rate",
        save_strategy="no",
        report_to="none",
    ),
)

# Trains for some steps at rates that grow, and puts the adapter back; lr_finder.svg in output_dir shows the curve.
best = trainer.get_best_learning_rate(steps=60)
print(f"best learning rate: {best:.1e}")
trainer.args.learning_rate = best
trainer_stats = trainer.train()
