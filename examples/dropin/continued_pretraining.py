"""Plain text for a base model: every linear layer gets an adapter, embedding and head are trained whole and slower.

pronghorn run examples/dropin/continued_pretraining.py
"""

from pathlib import Path
from threading import Thread

from datasets import load_dataset
from transformers import TextIteratorStreamer
from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, is_bfloat16_supported

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Llama-3.2-1B", max_seq_length=128, dtype=None, load_in_4bit=True
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        "embed_tokens", "lm_head",
    ],
    lora_alpha=32,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=True,
    loftq_config=None,
)  # fmt: skip

ARTICLE = "### {}\n\n{}"


def formatting_prompts_func(examples):
    return {
        "text": [
            ARTICLE.format(title, text) + tokenizer.eos_token
            for title, text in zip(examples["input"], examples["output"], strict=True)
        ]
    }


dataset = load_dataset("json", data_files=str(Path(__file__).with_name("questions.jsonl")), split="train")
dataset = dataset.train_test_split(train_size=0.9, seed=1)["train"]
dataset = dataset.map(formatting_prompts_func, batched=True)

trainer = UnslothTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=128,
    dataset_num_proc=1,
    args=UnslothTrainingArguments(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=10,
        warmup_ratio=0.1,
        learning_rate=5e-3,
        embedding_learning_rate=5e-4,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        seed=3407,
        output_dir="outputs/dropin/continued_pretraining",
        report_to="none",
    ),
)
trainer_stats = trainer.train()

FastLanguageModel.for_inference(model)
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
inputs = tokenizer(["### 3 days"], return_tensors="pt").to(model.device)
thread = Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, "max_new_tokens": 12})
thread.start()
pieces = list(streamer)
thread.join()
print("".join(pieces))
