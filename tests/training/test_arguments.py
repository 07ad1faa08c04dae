"""Arguments of every age are taken, and what the model decided stays decided."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model

from pronghorn.engine import bind, binding_of
from pronghorn.errors import DatasetUnusable, PackageMissing, UnknownArgument
from pronghorn.training import SFTConfig, SFTTrainer
from pronghorn.training.arguments import usable_optimizer
from pronghorn.training.config import as_sft_config
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.runs import adapter_model, chats, losses, settings, trainer


def notes(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "pronghorn"]


def test_older_arguments_are_noted_once_each(tmp_path, caplog):
    rows = chats(4).map(lambda row: {"body": row["messages"][0]["content"]}, remove_columns="messages")
    with caplog.at_level(logging.WARNING, "pronghorn"):
        run = SFTTrainer(
            model=adapter_model(), args=settings(tmp_path), train_dataset=rows, tokenizer=tiny_tokenizer(),
            dataset_text_field="body", max_seq_length=50, packing=True, dataset_num_proc=None,
        )  # fmt: skip
    older = [note for note in notes(caplog) if "now" in note]
    assert len(older) == 5
    assert run.args.max_length == 50 and run.args.packing is True and run.args.dataset_text_field == "body"
    assert "seq_lengths" in run.train_dataset.column_names
    run.train()


def test_a_model_with_its_tokenizer_in_place_of_a_model(tmp_path):
    pair = (adapter_model(), tiny_tokenizer())
    with pytest.raises(UnknownArgument, match="gives two things"):
        SFTTrainer(pair, args=settings(tmp_path), train_dataset=chats())


def test_no_rows_at_all(tmp_path):
    with pytest.raises(DatasetUnusable, match="nothing to train on"):
        SFTTrainer(adapter_model(), args=settings(tmp_path), processing_class=tiny_tokenizer())


def test_unknown_arguments_name_the_nearest(tmp_path):
    with pytest.raises(TypeError, match="'train_datasets': did you mean 'train_dataset'"):
        SFTTrainer(model=adapter_model(), args=settings(tmp_path), train_datasets=chats())
    with pytest.raises(TypeError, match="'learningrate': did you mean 'learning_rate'"):
        SFTConfig(output_dir=str(tmp_path), learningrate=1.0)


def test_training_arguments_keep_their_values(tmp_path):
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), learning_rate=3e-4, max_steps=7, optim="adamw_torch", warmup_steps=2,
        lr_scheduler_type="cosine", save_strategy="no", hub_token="secret", seed=5, report_to="none", use_cpu=True,
    )  # fmt: skip
    ours = as_sft_config(args)
    assert isinstance(ours, SFTConfig)
    for name in (
        "learning_rate",
        "max_steps",
        "optim",
        "warmup_steps",
        "lr_scheduler_type",
        "seed",
        "hub_token",
    ):
        assert getattr(ours, name) == getattr(args, name), name
    assert ours.logging_steps == args.logging_steps
    assert ours.bf16 is False


def test_trl_config_keeps_its_values_but_not_its_checkpointing(tmp_path, caplog):
    theirs = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=77, packing=True, use_cpu=True, report_to="none", bf16=False
    )
    with caplog.at_level(logging.WARNING, "pronghorn"):
        ours = as_sft_config(theirs)
    assert ours.max_length == 77 and ours.packing and not ours.gradient_checkpointing
    assert len(notes(caplog)) == 1


def test_max_seq_length_in_the_config(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "pronghorn"):
        args = SFTConfig(output_dir=str(tmp_path), max_seq_length=99)
    assert args.max_length == 99 and args.max_seq_length is None
    assert len(notes(caplog)) == 1


@pytest.mark.parametrize(
    "given, context, length",
    [("auto", None, 1024), ("auto", 96, 96), (50, 96, 50), (500, 96, 96), (None, 9999, None)],
)
def test_max_length_follows_the_model(tmp_path, given, context, length):
    model = adapter_model()
    if context is not None:
        model.max_seq_length = context
    run = trainer(tmp_path, model, max_length=given)
    assert run.args.max_length == length


@pytest.mark.parametrize("length", [0, -1, "long"])
def test_a_max_length_that_is_none(tmp_path, length):
    with pytest.raises(UnknownArgument, match="no number of tokens"):
        SFTConfig(output_dir=str(tmp_path), max_length=length)


def test_gradient_checkpointing_is_a_save_level(tmp_path):
    model = adapter_model()
    binding_of(model).set_save_levels("matmuls")
    run = trainer(tmp_path / "a", model)
    assert set(binding_of(model).save_levels) == {"matmuls"}
    again = trainer(tmp_path / "b", model, gradient_checkpointing=True)
    assert set(binding_of(model).save_levels) == {"none"}
    assert not again.args.gradient_checkpointing
    again.train()
    assert not model.is_gradient_checkpointing
    assert run.model is model


def test_the_model_is_left_as_it_was(tmp_path):
    """TRL lays a fused head over the forward and casts adapters of a quantised model; neither remains."""
    model = adapter_model()
    base = model.get_base_model()
    forward = base.__dict__["forward"]
    model.is_loaded_in_4bit = True
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer(tmp_path / "a", model)
    assert base.__dict__["forward"] is forward
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name]), name
    stock = adapter_model(bound=False)
    trainer(tmp_path / "b", stock)
    binding_of(stock).undo()
    assert "forward" not in stock.get_base_model().__dict__


def test_optimizers_that_need_a_gpu(caplog):
    with caplog.at_level(logging.WARNING, "pronghorn"):
        assert usable_optimizer("adamw_8bit", cuda=False) == "adamw_torch"
        assert usable_optimizer("paged_adamw_32bit", cuda=False) == "adamw_torch"
    assert len(notes(caplog)) == 2
    assert usable_optimizer("adamw_8bit", cuda=True) == "adamw_8bit"
    assert usable_optimizer("adamw_torch_fused", cuda=False) == "adamw_torch_fused"


def test_fp16_without_a_gpu_is_left_off(tmp_path):
    if not torch.cuda.is_available():
        assert SFTConfig(output_dir=str(tmp_path), fp16=True).fp16 is False


def test_collators_that_only_pad_are_replaced(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "pronghorn"):
        run = trainer(tmp_path, data_collator=transformers.DataCollatorForSeq2Seq(tiny_tokenizer()))
    assert type(run.data_collator).__name__ == "Collator" and run.data_collator.flat
    assert any("only pads" in note for note in notes(caplog))


def test_a_collator_of_ones_own(tmp_path):
    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        padded = {name: [] for name in ("input_ids", "labels", "attention_mask")}
        for row in rows:
            missing = longest - len(row["input_ids"])
            padded["input_ids"].append(row["input_ids"] + [0] * missing)
            padded["labels"].append(row["labels"] + [-100] * missing)
            padded["attention_mask"].append([1] * len(row["input_ids"]) + [0] * missing)
        return {name: torch.tensor(values) for name, values in padded.items()}

    own, ours = trainer(tmp_path / "a", data_collator=collate), trainer(tmp_path / "b")
    own.train()
    ours.train()
    assert losses(own)[0] == pytest.approx(losses(ours)[0], rel=1e-5)
    logged, expected = own.state.log_history[0], ours.state.log_history[0]
    assert logged["num_tokens"] == expected["num_tokens"]
    with pytest.raises(DatasetUnusable, match="packing"):
        trainer(tmp_path / "c", data_collator=collate, packing=True)


def test_no_data(tmp_path):
    with pytest.raises(DatasetUnusable, match="no rows"):
        trainer(tmp_path, rows=[])


def test_an_adapter_on_the_head_trains(tmp_path):
    """TRL refuses one, because its fused head would leave it out."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    bind(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lm_head.lora_B" in name}
    run = trainer(tmp_path, model)
    assert "get_output_embeddings" not in model.get_base_model().__dict__
    run.train()
    assert before
    for name, parameter in model.named_parameters():
        assert name not in before or not torch.equal(parameter, before[name])


def test_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = SFTTrainer(model=adapter_model(), train_dataset=chats(2), processing_class=tiny_tokenizer())
    assert run.args.output_dir == "outputs" and run.args.max_length == 1024
    assert (
        run.args.bf16 is False and not run.args.gradient_checkpointing and not run.args.logging_nan_inf_filter
    )


def test_documents_are_never_cut_by_packing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "pronghorn"):
        trainer(tmp_path / "a", packing=True, max_length=128)
        assert not any("packing_strategy" in note for note in notes(caplog))
        trainer(tmp_path / "b", packing=True, max_length=128, packing_strategy="wrapped")
    assert sum("packing_strategy" in note for note in notes(caplog)) == 1


def test_a_process_that_sees_several_gpus_trains_on_one(tmp_path, caplog):
    model = adapter_model()
    with caplog.at_level(logging.WARNING, "pronghorn"):
        for _ in range(2):
            args = settings(tmp_path)
            assert args.n_gpu <= 1
            args._n_gpu = 2
            run = SFTTrainer(model, args=args, train_dataset=chats(4), processing_class=tiny_tokenizer())
    assert run.args.n_gpu == 1 and sum("one of 2 GPUs" in note for note in notes(caplog)) == 1
    assert not isinstance(run._wrap_model(run.model), torch.nn.DataParallel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate=nan is outside"),
        ({"learning_rate": 2e4}, "learning_rate=20000.0 is outside .* 0 to 100"),
        ({"seed": -1}, "seed=-1 is outside .* 0 to 4294967295"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0 is outside .* below 1"),
        ({"train_sampling_strategy": "group_by_lenght"}, "train_sampling_strategy.*'group_by_length'"),
        ({"truncation_mode": "end"}, "truncation_mode='end' does not exist"),
        ({"loss_type": "ce"}, "loss_type='ce' does not exist"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "asks for|min_lr_rate"),
        ({"lr_scheduler_kwargs": {"rate": 1}}, "lr_scheduler_type='linear' cannot be made .*rate"),
        ({"save_strategy": "best"}, "save_strategy='best' needs evaluations"),
    ],
)
def test_values_that_would_be_taken_without_a_word_or_refused_late(arguments, message):
    with pytest.raises(UnknownArgument, match=message):
        SFTConfig(report_to="none", **arguments)


def test_values_at_the_ends_of_their_ranges():
    SFTConfig(
        report_to="none", learning_rate=0.0, seed=2**32 - 1, label_smoothing_factor=1.0, loss_type="chunked_nll",
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 5}, adam_beta1=0.0,
    )  # fmt: skip


def test_an_optimizer_that_cannot_be_made(tmp_path):
    with pytest.raises(UnknownArgument, match="optim='sgd' cannot be made"):
        trainer(tmp_path, optim_args="momentum").train()
    with pytest.raises(PackageMissing, match="optim='lomo' needs a package"):
        trainer(tmp_path, optim="lomo").train()
