"""Four learning rates, each with a fresh model and trainer; the one with the lowest last loss is named.

pronghorn run examples/dropin/learning_rates.py
"""

from pathlib import Path

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

dataset = load_dataset("json", data_files=str(Path(__file__).with_name("questions.jsonl")), split="train")
losses = {}

for learning_rate in (1e-5, 1e-4, 1e-3, 5e-3):
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name="unsloth/Llama-3.2-1B", max_seq_length=256, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, random_state=3407)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset,
        args=SFTConfig(
            per_device_train_batch_size=8,
            max_steps=8,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            seed=3407,
            output_dir="outputs/dropin/learning_rates",
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    losses[learning_rate] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

for learning_rate, curve in losses.items():
    print(f"{learning_rate:8.0e}  {curve[0]:.3f} -> {curve[-1]:.3f}")
best = min(losses, key=lambda rate: losses[rate][-1])
print(f"the lowest last loss: {best:.0e}")
