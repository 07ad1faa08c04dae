"""A table as conversations in a format of one's own: columns are merged, rows joined, and answers alone are learnt.

pronghorn run examples/dropin/table.py
"""

from pathlib import Path

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel, apply_chat_template, standardize_sharegpt, to_sharegpt
from unsloth.chat_templates import train_on_responses_only

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/llama-3-8b-bnb-4bit", max_seq_length=256, dtype=None, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=3407)

dataset = load_dataset("json", data_files=str(Path(__file__).with_name("questions.jsonl")), split="train")
dataset = to_sharegpt(
    dataset,
    merged_prompt="{instruction}[[\nThe quantity is:\n{input}]]",
    output_column_name="output",
    conversation_extension=2,
)
dataset = standardize_sharegpt(dataset)

chat_template = """Answer in one sentence.

# Question
{INPUT}

# Answer
{OUTPUT}"""
dataset = apply_chat_template(dataset, tokenizer=tokenizer, chat_template=chat_template)
print(dataset[0]["text"])

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=256,
    packing=False,
    args=SFTConfig(
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=5e-3,
        logging_steps=1,
        optim="adamw_8bit",
        seed=3407,
        output_dir="outputs/dropin/table",
        report_to="none",
    ),
)
trainer = train_on_responses_only(trainer, instruction_part="# Question\n", response_part="# Answer\n")
labels = [token for token in trainer.train_dataset[0]["labels"] if token != -100]
learnt = tokenizer.decode(labels)
print(f"trained on: {learnt!r}")
trainer.train()

FastLanguageModel.for_inference(model)
input_ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Convert weeks to days.\nThe quantity is:\n3 weeks"}],
    add_generation_prompt=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(input_ids, max_new_tokens=12, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(output[0][input_ids.shape[1] :]))
