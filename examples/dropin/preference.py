"""Which of two answers is preferred: TRL's DPO on a model with an adapter, in the arguments of older notebooks.

pronghorn run examples/dropin/preference.py
"""

from pathlib import Path

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer
from unsloth import FastLanguageModel, PatchDPOTrainer, is_bfloat16_supported

PatchDPOTrainer()

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Qwen2.5-0.5B-Instruct", max_seq_length=128, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing="unsloth")


def as_pair(row):
    """The answer in the asked unit is preferred to a shrug."""
    return {
        "prompt": f"{row['instruction']} {row['input']}\n",
        "chosen": row["output"],
        "rejected": "I do not know.",
    }


dataset = load_dataset("json", data_files=str(Path(__file__).with_name("questions.jsonl")), split="train")
dataset = dataset.map(as_pair, remove_columns=dataset.column_names)

dpo_trainer = DPOTrainer(
    model=model,
    ref_model=None,
    args=DPOConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_ratio=0.1,
        max_steps=6,
        learning_rate=1e-3,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_8bit",
        lr_scheduler_type="linear",
        seed=42,
        output_dir="outputs/dropin/preference",
        report_to="none",
    ),
    beta=0.1,
    train_dataset=dataset,
    tokenizer=tokenizer,
    max_length=128,
    max_prompt_length=64,
)
dpo_trainer.train()
model.save_lora("outputs/dropin/preference/lora_model")
