"""Codes in place of words, as models that speak have them: new tokens, rows of ids, Transformers' own trainer, and a
run that goes on from its checkpoint.

pronghorn run examples/dropin/codes.py
"""

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from unsloth import FastLanguageModel, add_new_tokens

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/orpheus-3b-0.1-pretrained", max_seq_length=128, dtype=None, load_in_4bit=False
)
codes = [f"<code_{number}>" for number in range(8)]
add_new_tokens(model, tokenizer, new_tokens=[*codes, "<speech>", "</speech>"])
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head",
    ],
    lora_alpha=32,
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)  # fmt: skip


def as_ids(row):
    spoken = "".join(codes[(row["number"] + step) % len(codes)] for step in range(6))
    ids = tokenizer(f"Count from {row['number']}: ", add_special_tokens=False)["input_ids"]
    speech = tokenizer(f"<speech>{spoken}</speech>", add_special_tokens=False)["input_ids"]
    return {"input_ids": [*ids, *speech], "labels": [-100] * len(ids) + speech}


dataset = Dataset.from_list([{"number": number % 8} for number in range(32)]).map(
    as_ids, remove_columns=["number"]
)


def trainer_for(steps):
    return Trainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        args=TrainingArguments(
            per_device_train_batch_size=4,
            warmup_steps=1,
            max_steps=steps,
            save_steps=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            optim="adamw_8bit",
            seed=3407,
            output_dir="outputs/dropin/codes",
            report_to="none",
        ),
    )


trainer_for(4).train()
trainer = trainer_for(8)
trainer.train(resume_from_checkpoint=True)
model.save_pretrained("outputs/dropin/codes/lora_model")
tokenizer.save_pretrained("outputs/dropin/codes/lora_model")

again, its_tokenizer = FastLanguageModel.from_pretrained(
    "outputs/dropin/codes/lora_model", load_in_4bit=False
)
FastLanguageModel.for_inference(again)
inputs = its_tokenizer("Count from 3: <speech>", return_tensors="pt").to(again.device)
output = again.generate(**inputs, max_new_tokens=6, do_sample=False)
print(its_tokenizer.decode(output[0][inputs["input_ids"].shape[1] :]))
