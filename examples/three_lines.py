"""The library in three lines, on a CPU or a GPU, with the quickstart's model and Python's own docstrings as rows.

make quickstart                      # once: makes .venv and installs the model
.venv/bin/python examples/three_lines.py
"""

from datasets import Dataset

from pronghorn import FastLanguageModel, SFTConfig, SFTTrainer
from pronghorn.cli.models import find_quickstart_model
from pronghorn.data.docstrings import docstring_rows

rows = Dataset.from_list([{"messages": row.messages()} for row in docstring_rows()[:400]])
settings = SFTConfig(
    output_dir="outputs/three_lines",
    max_steps=10,
    per_device_train_batch_size=8,
    learning_rate=1e-3,
    logging_steps=1,
)

# A hub id, a folder or a .gguf file.
model, tokenizer = FastLanguageModel.from_pretrained(
    str(find_quickstart_model()), max_seq_length=256, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
SFTTrainer(model, args=settings, processing_class=tokenizer, train_dataset=rows).train()

model.save_pretrained("outputs/three_lines/adapter")
model.save_pretrained_merged("outputs/three_lines/merged", tokenizer)
print("saved outputs/three_lines/adapter and outputs/three_lines/merged")
