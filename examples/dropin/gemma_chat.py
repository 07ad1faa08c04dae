"""A Gemma 3 model, its own chat format, the loss over its answers alone, and a merged model.

pronghorn run examples/dropin/gemma_chat.py
"""

from pathlib import Path

from datasets import load_dataset
from transformers import TextStreamer
from trl import SFTConfig, SFTTrainer
from unsloth import FastModel
from unsloth.chat_templates import get_chat_template, standardize_data_formats, train_on_responses_only

model, tokenizer = FastModel.from_pretrained(
    model_name="unsloth/gemma-3-1b-it",
    max_seq_length=256,
    load_in_4bit=True,
    load_in_8bit=False,
    full_finetuning=False,
)
model = FastModel.get_peft_model(
    model,
    finetune_vision_layers=False,
    finetune_language_layers=True,
    finetune_attention_modules=True,
    finetune_mlp_modules=True,
    r=8,
    lora_alpha=8,
    lora_dropout=0,
    bias="none",
    random_state=3407,
)
tokenizer = get_chat_template(tokenizer, chat_template="gemma-3")

dataset = load_dataset("json", data_files=str(Path(__file__).with_name("chats.jsonl")), split="train")
dataset = standardize_data_formats(dataset)


def as_text(examples):
    """Without the first token, which the tokenizer puts there itself."""
    return {
        "text": [
            tokenizer.apply_chat_template(turns, tokenize=False).removeprefix("<bos>")
            for turns in examples["conversations"]
        ]
    }


dataset = dataset.map(as_text, batched=True)

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    eval_dataset=None,
    args=SFTConfig(
        dataset_text_field="text",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        warmup_steps=2,
        max_steps=10,
        learning_rate=5e-3,
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.001,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="outputs/dropin/gemma_chat",
        report_to="none",
    ),
)
trainer = train_on_responses_only(
    trainer, instruction_part="<start_of_turn>user\n", response_part="<start_of_turn>model\n"
)
shown = [tokenizer.pad_token_id if label == -100 else label for label in trainer.train_dataset[3]["labels"]]
print(f"trained on: {tokenizer.decode(shown).replace(tokenizer.pad_token, '').strip()!r}")
trainer_stats = trainer.train()

messages = [{"role": "user", "content": [{"type": "text", "text": "Convert days to hours. 2 days"}]}]
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
output = model.generate(
    **tokenizer([text], return_tensors="pt").to(model.device),
    max_new_tokens=16,
    streamer=TextStreamer(tokenizer, skip_prompt=True),
)
model.save_pretrained_merged("outputs/dropin/gemma_chat/merged", tokenizer)
