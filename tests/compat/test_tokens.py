"""Token ids of conversations in the form that scripts expect, older calls of Transformers' and TRL's trainers."""

import copy
import pickle

import pytest
import torch
import transformers
from datasets import Dataset

from pronghorn import binding_of
from pronghorn.compat import preference, tokens
from pronghorn.compat.models import FastLanguageModel
from pronghorn.compat.script import run_script
from pronghorn.compat.trainer import PlainTrainer
from pronghorn.errors import AdapterProblem, DropInUnavailable, TargetModuleNotFound

CHAT = [{"role": "user", "content": "Why?"}]


@pytest.fixture
def loaded(tiny):
    return FastLanguageModel.from_pretrained(tiny, load_in_4bit=False)


def test_conversations_are_ids_as_they_were_and_todays_dictionary(loaded):
    model, tokenizer = loaded
    today = type(tokenizer).apply_chat_template(tokenizer, CHAT, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert list(ids) == today["input_ids"] == ids["input_ids"] == ids.input_ids and len(ids) > 5
    assert tokenizer.decode(ids) == tokenizer.decode(today["input_ids"])
    assert dict(**pickle.loads(pickle.dumps(ids))) == dict(today)
    rows = Dataset.from_list([{"chat": CHAT}] * 2)
    counted = rows.map(lambda row: {"ids": tokenizer.apply_chat_template(row["chat"])}, batched=True)
    assert counted[1]["ids"] == list(tokenizer.apply_chat_template(CHAT))

    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt").to("cpu")
    assert inputs.shape == (1, len(ids)) and inputs[0].tolist() == list(ids) and inputs[:, -1].shape == (1,)
    how = {"max_new_tokens": 3, "do_sample": False}
    answers = [
        model.generate(inputs, **how), model.generate(input_ids=inputs, **how), model.generate(**inputs, **how),
        model.generate(inputs.input_ids, **how),
    ]  # fmt: skip
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert isinstance(tokenizer.apply_chat_template(CHAT, tokenize=False), str)
    asked = tokenizer.apply_chat_template(CHAT, return_dict=True)
    assert type(asked) is transformers.BatchEncoding


def test_copies_have_their_own_and_libraries_get_todays(loaded, tmp_path, monkeypatch):
    _, tokenizer = loaded
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert other.decode(other.apply_chat_template(CHAT)) == "Why?"
    assert len(pickle.loads(pickle.dumps(tokenizer)).apply_chat_template(CHAT)) > 5
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(tokens, "asked_by_user", lambda frame: False)
    assert type(tokenizer.apply_chat_template(CHAT)) is transformers.BatchEncoding


def test_transformers_trainer_takes_a_tokenizer(loaded, tmp_path):
    model, tokenizer = loaded
    model = FastLanguageModel.get_peft_model(model, r=4)
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4)
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=6,
        learning_rate=1e-1,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = PlainTrainer(model=model, args=args, train_dataset=rows, tokenizer=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.processing_class is tokenizer and losses[-1] < losses[0]
    (tmp_path / "one.py").write_text("from transformers import Trainer\n")
    assert run_script(tmp_path / "one.py")["Trainer"] is PlainTrainer


def test_groups_of_answers_are_whole_and_vllm_is_not_asked(caplog):
    args = preference.GRPOConfig(
        "out", per_device_train_batch_size=1, num_generations=4, use_vllm=True, report_to="none"
    )
    assert (args.per_device_train_batch_size, args.use_vllm) == (4, False)
    assert "it is 4 now" in caplog.text and "use_vllm=True has no effect" in caplog.text
    kept = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_generations": 4}
    assert preference.GRPOConfig("out", **kept, report_to="none").per_device_train_batch_size == 1


def test_plain_arguments_and_a_second_trainer_on_the_same_model(loaded, tmp_path):
    """A cell that is run again; DPO's reference of the first trainer is gone then."""
    model, tokenizer = loaded
    model = FastLanguageModel.get_peft_model(model, r=4)
    rows = Dataset.from_list([{"prompt": "one", "chosen": " two", "rejected": " three"}] * 4)
    args = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, seed=7)
    for _ in range(2):
        trainer = preference.DPOTrainer(
            model, None, args=args, beta=0.3, train_dataset=rows, tokenizer=tokenizer, max_length=64
        )
    assert (trainer.args.beta, trainer.args.max_length, trainer.args.seed) == (0.3, 64, 7)
    trainer = preference.DPOTrainer(model, None, trainer.args, train_dataset=rows, tokenizer=tokenizer)
    assert trainer.args.max_length == 64
    unpaired = Dataset.from_list([{"prompt": "one", "completion": " two", "label": True}] * 4)
    config = preference.KTOConfig(
        str(tmp_path), max_prompt_length=8, max_length=64, report_to="none", use_cpu=True
    )
    assert (
        preference.KTOTrainer(model, args=config, train_dataset=unpaired, tokenizer=tokenizer).args.max_length
        == 64
    )


def test_a_cell_that_is_run_again_keeps_its_adapter_and_whole_models_get_none(loaded, tiny, caplog):
    model, _ = loaded
    how = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    adapted = FastLanguageModel.get_peft_model(model, **how)
    assert FastLanguageModel.get_peft_model(adapted, **how) is adapted and "already" in caplog.text
    with pytest.raises(AdapterProblem, match="has an adapter already"):
        FastLanguageModel.get_peft_model(adapted, **{**how, "r": 8})
    usual = {"bias": "none", "use_rslora": False, "loftq_config": None, "random_state": 3407}
    assert FastLanguageModel.get_peft_model(adapted, **how, **usual) is adapted
    with pytest.raises(AdapterProblem, match="has an adapter already"):
        FastLanguageModel.get_peft_model(adapted, **how, use_dora=True)
    whole, _ = FastLanguageModel.from_pretrained(tiny, full_finetuning=True)
    assert FastLanguageModel.get_peft_model(whole, r=4) is whole
    assert all(parameter.requires_grad for parameter in whole.parameters())
    with pytest.raises(DropInUnavailable, match=r"WhisperForConditionalGeneration.*speech model"):
        FastLanguageModel.from_pretrained(tiny, auto_model=transformers.WhisperForConditionalGeneration)


def test_target_modules_of_another_model_are_left_out_and_misspelt_ones_are_not(loaded, caplog):
    model, _ = loaded
    with pytest.raises(TargetModuleNotFound, match="did you mean 'q_proj'"):
        FastLanguageModel.get_peft_model(model, target_modules=["q_prj", "v_proj"])
    with pytest.raises(TargetModuleNotFound):
        FastLanguageModel.get_peft_model(model, target_modules=["shared_mlp.input_linear"])
    names = ["q_proj", "mlp.up_proj", "shared_mlp.input_linear"]
    adapted = FastLanguageModel.get_peft_model(model, r=4, target_modules=names)
    assert "has shared_mlp.input_linear, which" in caplog.text
    found = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert {name.rsplit(".", 1)[1] for name in found} == {"q_proj", "up_proj"}


def test_an_adapter_that_peft_put_on_takes_the_fast_path(loaded):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    assert FastLanguageModel.patch_peft_model(adapted, use_gradient_checkpointing=True) is adapted
    assert binding_of(adapted).bound and adapted.fast_generate("one")[0].outputs
    adapted.save_pretrained_merged("merged", tokenizer)
    assert transformers.AutoModelForCausalLM.from_pretrained("merged").config.num_hidden_layers == 2
