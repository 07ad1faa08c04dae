"""A model for images and text learns to say which colour fills a picture, in the style of Unsloth's vision notebooks.

pronghorn run examples/dropin/vision.py
"""

import torch
from PIL import Image
from trl import SFTConfig, SFTTrainer
from unsloth import FastVisionModel
from unsloth.trainer import UnslothVisionDataCollator

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
INSTRUCTION = "Which colour is this?"

model, tokenizer = FastVisionModel.from_pretrained(
    "unsloth/Qwen2-VL-2B-Instruct",
    load_in_4bit=torch.cuda.is_available(),
    use_gradient_checkpointing="unsloth",
)
model = FastVisionModel.get_peft_model(
    model,
    finetune_vision_layers=False,
    finetune_language_layers=True,
    finetune_attention_modules=True,
    finetune_mlp_modules=True,
    r=16,
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    random_state=3407,
)


def convert_to_conversation(name):
    picture = Image.new("RGB", (48, 48), COLOURS[name])
    return {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": INSTRUCTION}, {"type": "image", "image": picture}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": name}]},
        ]
    }


converted_dataset = [convert_to_conversation(name) for name in list(COLOURS) * 8]

FastVisionModel.for_training(model)
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    data_collator=UnslothVisionDataCollator(model, tokenizer),
    train_dataset=converted_dataset,
    args=SFTConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_steps=2,
        max_steps=20,
        learning_rate=5e-3,
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="outputs/dropin/vision",
        report_to="none",
        remove_unused_columns=False,
        dataset_text_field="",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=256,
    ),
)
trainer_stats = trainer.train()

model.save_pretrained("outputs/dropin/vision/lora_model")
tokenizer.save_pretrained("outputs/dropin/vision/lora_model")
model.save_pretrained_merged("outputs/dropin/vision/merged", tokenizer)

FastVisionModel.for_inference(model)
messages = [{"role": "user", "content": [{"type": "text", "text": INSTRUCTION}, {"type": "image"}]}]
input_text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
picture = converted_dataset[0]["messages"][0]["content"][1]["image"]
inputs = tokenizer(picture, input_text, add_special_tokens=False, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=8, use_cache=True)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(f"answer: {answer!r}")
