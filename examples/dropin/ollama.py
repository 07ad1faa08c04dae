"""From a short training to GGUF files and the Modelfile that Ollama reads.

pronghorn run examples/dropin/ollama.py
ollama create converter -f outputs/dropin/ollama/model/Modelfile
"""

from pathlib import Path

from datasets import load_dataset
from transformers import TrainingArguments
from trl import SFTTrainer
from unsloth import FastLanguageModel
from unsloth.chat_templates import get_chat_template, standardize_sharegpt

model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/Llama-3.2-1B-Instruct", max_seq_length=256, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
tokenizer = get_chat_template(tokenizer, chat_template="chatml")

dataset = load_dataset("json", data_files=str(Path(__file__).with_name("chats.jsonl")), split="train")
dataset = standardize_sharegpt(dataset).map(
    lambda row: {"text": tokenizer.apply_chat_template(row["conversations"], tokenize=False)}
)
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=256,
    args=TrainingArguments(
        per_device_train_batch_size=8,
        max_steps=6,
        learning_rate=5e-3,
        logging_steps=1,
        seed=3407,
        output_dir="outputs/dropin/ollama",
        report_to="none",
    ),
)
trainer.train()

model.save_pretrained_gguf(
    "outputs/dropin/ollama/model", tokenizer, quantization_method=["q8_0", "f16"], maximum_memory_usage=0.8
)
print(tokenizer._ollama_modelfile)
