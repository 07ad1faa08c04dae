"""QLoRA in three parts, as in a notebook: load in 4 bits and put an adapter on, prepare rows, train.

pronghorn run examples/dropin/qlora.py
pronghorn run --model ./my-model examples/dropin/qlora.py       # a local folder in place of the id below
"""

from pathlib import Path

from datasets import load_dataset
from transformers import TrainingArguments
from trl import SFTTrainer
from unsloth import FastLanguageModel, is_bfloat16_supported

max_seq_length = 256
dtype = None  # the hardware decides
load_in_4bit = True

# 1. The model

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/llama-3-8b-bnb-4bit",
    max_seq_length=max_seq_length,
    dtype=dtype,
    load_in_4bit=load_in_4bit,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)

# 2. The rows

alpaca_prompt = """Below is a task, with an input that gives more to go on. Write an answer that completes the task.

### Instruction:
{}

### Input:
{}

### Response:
{}"""
EOS_TOKEN = tokenizer.eos_token  # without it an answer never ends


def formatting_prompts_func(examples):
    fields = zip(examples["instruction"], examples["input"], examples["output"], strict=True)
    return {"text": [alpaca_prompt.format(*row) + EOS_TOKEN for row in fields]}


rows = str(Path(__file__).with_name("questions.jsonl"))
dataset = load_dataset("json", data_files=rows, split="train")
dataset = dataset.map(formatting_prompts_func, batched=True)

# 3. The run

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    dataset_num_proc=1,
    packing=False,
    args=TrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=5,
        max_steps=12,
        learning_rate=2e-3,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        seed=3407,
        output_dir="outputs/dropin/qlora",
        report_to="none",
    ),
)
trainer_stats = trainer.train()
print(f"{trainer_stats.metrics['train_runtime']} seconds used for training.")
print(f"{round(trainer_stats.metrics['train_runtime'] / 60, 2)} minutes used for training.")
model.save_pretrained("outputs/dropin/qlora/lora_model")
tokenizer.save_pretrained("outputs/dropin/qlora/lora_model")
