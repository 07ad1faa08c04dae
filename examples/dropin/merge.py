"""Train a little, merge the adapter into the weights, and load the result with Transformers alone.

pronghorn run examples/dropin/merge.py
"""

from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.get_peft_model(
    model_name="unsloth/Llama-3.2-1B", max_seq_length=256, load_in_4bit=False, r=16, lora_alpha=32
)
dataset = load_dataset("json", data_files=str(Path(__file__).with_name("questions.jsonl")), split="train")
settings = SFTConfig(
    per_device_train_batch_size=8, max_steps=6, learning_rate=2e-3, report_to="none",
    output_dir="outputs/dropin/merge", save_strategy="no", logging_steps=2,
)  # fmt: skip
SFTTrainer(model=model, args=settings, processing_class=tokenizer, train_dataset=dataset).train()

model.save_pretrained_merged("outputs/dropin/merge/model", tokenizer, save_method="merged_16bit")

FastLanguageModel.for_inference(model)
prompt = tokenizer("Convert hours to minutes. 3 hours", return_tensors="pt").to(model.device)
ours = model.generate(**prompt, max_new_tokens=12, do_sample=False)

stock = AutoModelForCausalLM.from_pretrained("outputs/dropin/merge/model", dtype=model.dtype)
stock_tokenizer = AutoTokenizer.from_pretrained("outputs/dropin/merge/model")
prompt = stock_tokenizer("Convert hours to minutes. 3 hours", return_tensors="pt")
theirs = stock.generate(**prompt, max_new_tokens=12, do_sample=False)
print(stock_tokenizer.batch_decode(theirs)[0])
same_answer = torch.equal(ours.cpu(), theirs)
print(f"the merged model answers as the adapter did: {same_answer}")
