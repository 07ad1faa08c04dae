"""Conversations in ShareGPT's names, a chat template, and a loss over answers alone.

pronghorn run examples/dropin/chat_template.py
"""

from pathlib import Path

from datasets import load_dataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments
from trl import SFTTrainer
from unsloth import FastLanguageModel, is_bf16_supported
from unsloth.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only

model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Qwen2.5-0.5B-Instruct", max_seq_length=256)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing=True)

tokenizer = get_chat_template(tokenizer, chat_template="chatml")


def formatting_prompts_func(examples):
    texts = [
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False)
        for conversation in examples["conversations"]
    ]
    return {"text": texts}


dataset = load_dataset("json", data_files=str(Path(__file__).with_name("chats.jsonl")), split="train")
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(formatting_prompts_func, batched=True)
print(dataset[5]["text"])

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=256,
    data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer),
    packing=False,
    args=TrainingArguments(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        warmup_steps=2,
        max_steps=10,
        learning_rate=2e-3,
        fp16=not is_bf16_supported(),
        bf16=is_bf16_supported(),
        use_reentrant=False,
        logging_steps=1,
        optim="adamw_8bit",
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="outputs/dropin/chat_template",
        report_to="none",
    ),
)
trainer = train_on_responses_only(
    trainer,
    instruction_part="<|im_start|>user\n",
    response_part="<|im_start|>assistant\n",
)
labels = trainer.train_dataset[5]["labels"]
trained_on = tokenizer.decode([label for label in labels if label != -100])
print(f"trained on: {trained_on!r}")
trainer_stats = trainer.train()
