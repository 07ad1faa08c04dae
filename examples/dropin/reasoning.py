"""Working before answering: some steps into the format, then rewards (GRPO), then answers without and with the adapter.

pronghorn run examples/dropin/reasoning.py
"""

import re
from pathlib import Path

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from unsloth import FastLanguageModel
from vllm import SamplingParams

max_seq_length = 128
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Qwen3-0.6B-Base",
    max_seq_length=max_seq_length,
    load_in_4bit=False,
    fast_inference=True,
    max_lora_rank=16,
    gpu_memory_utilization=0.7,
)
model = FastLanguageModel.get_peft_model(
    model, r=16, lora_alpha=32, use_gradient_checkpointing="unsloth", random_state=3407
)

# A format of our own: what is worked out stands between two marks, the answer after them.

BEGIN, END = "<working>", "</working>"
tokenizer.chat_template = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: BEGIN' }}{% endif %}"
).replace("BEGIN", BEGIN)

dataset = load_dataset("json", data_files=str(Path(__file__).with_name("questions.jsonl")), split="train")


def as_chat(row):
    asked = {"role": "user", "content": f"{row['instruction']} {row['input']}"}
    answered = {"role": "assistant", "content": f"{BEGIN}I count.{END}{row['output']}"}
    return {"Messages": [asked, answered], "prompt": [asked], "answer": row["output"]}


dataset = dataset.map(as_chat, remove_columns=dataset.column_names)
lengths = dataset.map(
    lambda rows: {"tokens": tokenizer.apply_chat_template(rows["prompt"], add_generation_prompt=True)},
    batched=True,
)
longest = max(len(tokens) for tokens in lengths["tokens"])
print(f"the longest question has {longest} tokens")

format_rows = dataset.select(range(16)).map(
    lambda row: {"text": tokenizer.apply_chat_template(row["Messages"], tokenize=False)}
)
format_trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=format_rows.select_columns(["text"]),
    args=SFTConfig(
        dataset_text_field="text",
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=5e-3,
        logging_steps=1,
        optim="adamw_8bit",
        output_dir="outputs/dropin/reasoning/format",
        report_to="none",
    ),
)
format_trainer.train()


def has_format(completions, **kwargs):
    return [1.0 if END in answer[0]["content"] else -1.0 for answer in completions]


def has_number(prompts, completions, answer, **kwargs):
    wanted = [re.findall(r"\d+", text) for text in answer]
    return [
        float(any(n in c[0]["content"] for n in found)) for c, found in zip(completions, wanted, strict=True)
    ]


trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[has_format, has_number],
    args=GRPOConfig(
        vllm_sampling_params=SamplingParams(
            min_p=0.1,
            top_p=1.0,
            top_k=-1,
            seed=3407,
            stop=[tokenizer.eos_token],
            include_stop_str_in_output=True,
        ),
        use_vllm=True,
        temperature=1.0,
        learning_rate=5e-6,
        warmup_ratio=0.1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        num_generations=4,
        max_prompt_length=longest + 1,
        max_completion_length=8,
        max_steps=1,
        logging_steps=1,
        optim="adamw_8bit",
        output_dir="outputs/dropin/reasoning",
        report_to="none",
    ),
    train_dataset=dataset,
)
trainer.train()

text = tokenizer.apply_chat_template(dataset[0]["prompt"], tokenize=False, add_generation_prompt=True)
sampling_params = SamplingParams(temperature=0, max_tokens=8)
before = model.fast_generate([text], sampling_params=sampling_params, lora_request=None)[0].outputs[0].text
model.save_lora("outputs/dropin/reasoning/saved_lora")
after = (
    model.fast_generate(
        text,
        sampling_params=sampling_params,
        lora_request=model.load_lora("outputs/dropin/reasoning/saved_lora"),
    )[0]
    .outputs[0]
    .text
)
print(f"before: {before!r}\nafter: {after!r}")
