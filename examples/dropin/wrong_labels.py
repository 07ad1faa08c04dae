"""The same run twice: on the rows as they are, and with 10 % of the answers swapped for another row's.

pronghorn run examples/dropin/wrong_labels.py
"""

import random
from pathlib import Path

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

dataset = load_dataset("json", data_files=str(Path(__file__).with_name("questions.jsonl")), split="train")
parts = dataset.train_test_split(test_size=16, seed=3407)
chosen = sorted(random.Random(3407).sample(range(len(parts["train"])), k=round(len(parts["train"]) / 10)))


def swap(row, index):
    """The answer of the row half the data away."""
    if index not in chosen:
        return row
    return {
        **row,
        "output": parts["train"][(index + len(parts["train"]) // 2) % len(parts["train"])]["output"],
    }


def train(rows):
    model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-1B", max_seq_length=256)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, random_state=3407)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=parts["test"],
        args=SFTConfig(
            per_device_train_batch_size=8,
            num_train_epochs=4,
            learning_rate=2e-3,
            logging_steps=6,
            seed=3407,
            output_dir="outputs/dropin/wrong_labels",
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    return trainer.evaluate()["eval_loss"]


clean = train(parts["train"])
wrong = train(parts["train"].map(swap, with_indices=True))
print(
    f"loss on {len(parts['test'])} held-back rows: {clean:.4f} as they are, {wrong:.4f} with {len(chosen)} wrong"
)
