"""Answers from a model, word by word.

pronghorn run examples/dropin/inference.py
pronghorn run examples/dropin/inference.py outputs/dropin/qlora/lora_model     # an adapter that was trained
"""

import sys

from transformers import TextStreamer
from unsloth import FastLanguageModel
from unsloth.chat_templates import get_chat_template

name = sys.argv[1] if len(sys.argv) > 1 else "unsloth/Llama-3.2-1B-Instruct"
model, tokenizer = FastLanguageModel.from_pretrained(model_name=name, max_seq_length=256, dtype=None)
tokenizer = get_chat_template(
    tokenizer,
    chat_template="chatml",
    mapping={"role": "from", "content": "value", "user": "human", "assistant": "gpt"},
    map_eos_token=True,
)
FastLanguageModel.for_inference(model)

messages = [{"from": "human", "value": "Convert weeks to days. 3 weeks"}]
inputs = tokenizer.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
streamer = TextStreamer(tokenizer, skip_prompt=True)
output = model.generate(**inputs, streamer=streamer, max_new_tokens=24, use_cache=True)
new_tokens = output.shape[1] - inputs["input_ids"].shape[1]
print(f"{new_tokens} tokens")
