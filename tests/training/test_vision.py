"""The trainer on rows with images: the training that Transformers' own trainer does, and what goes around it."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

pytest.importorskip("PIL")

from pronghorn import VisionDataCollator, train_on_responses_only
from pronghorn.engine import bind, binding_of
from pronghorn.errors import DatasetUnusable, ImageUnreadable, TokenizerProblem
from pronghorn.training import SFTTrainer
from tests.families.parity import TARGETS, add_adapter
from tests.tiny import tiny_tokenizer
from tests.tiny_vision import (
    chat_rows,
    tiny_llava,
    tiny_llava_processor,
    tiny_processor,
    tiny_vision_model,
)
from tests.training.runs import chats, losses, settings

TEXT = rf".*language_model.*\.({'|'.join(TARGETS)})"


def adapted(kind, *, bound=True, targets=TEXT):
    model = add_adapter(tiny_vision_model(kind), target_modules=targets)
    if bound:
        bind(model, strict=True)
    return model


def trainer(folder, model, kind="qwen2_5_vl", rows=None, **options):
    more = {name: options.pop(name) for name in ("eval_dataset", "data_collator") if name in options}
    return SFTTrainer(
        model=model,
        args=settings(folder, **options),
        train_dataset=chat_rows() * 4 if rows is None else rows,
        processing_class=tiny_processor(kind),
        **more,
    )


@pytest.fixture
def one_thread():
    """Sums in one order: five steps at a rate of 0.1 carry on what another order makes of one, to 1e-5 with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_training_is_that_of_transformers(tmp_path, kind):
    given = {"max_steps": 5, "per_device_train_batch_size": 3, "max_length": 128}
    run = trainer(tmp_path / "ours", adapted(kind), kind, **given)
    run.train()
    assert run._steps._step is not None and run._steps._step.reason is None, "the static step ran"
    stock = adapted(kind, bound=False)
    theirs = Trainer(
        stock,
        TrainingArguments(
            output_dir=str(tmp_path / "theirs"),
            max_steps=5,
            per_device_train_batch_size=3,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            seed=run.args.seed,
        ),
        data_collator=VisionDataCollator(stock, tiny_processor(kind)),
        train_dataset=run.train_dataset,
    )
    theirs.train()
    assert losses(run) == pytest.approx(losses(theirs), rel=1e-4)
    assert losses(run)[0] - losses(run)[-1] > 0.05
    for (name, a), (_, b) in zip(run.model.named_parameters(), stock.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name
    assert not binding_of(run.model)._told


def test_micro_batches_add_up(tmp_path):
    """One step of four rows, as one batch and as four; adapters on the tower are not in flat storage."""
    everywhere = r".*(language_model.*|visual.*attn)\.(q_proj|down_proj|qkv)"
    runs = []
    for size, parts in ((4, 1), (1, 4)):
        model = adapted("qwen2_5_vl", targets=everywhere)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        runs.append(trainer(tmp_path / str(size), model, max_steps=2, **options))
        runs[-1].train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    for (name, a), (_, b) in zip(*(run.model.named_parameters() for run in runs), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6), name


def test_evaluation_and_a_resumed_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    whole = trainer(
        tmp_path / "a", adapted("gemma3"), "gemma3", eval_dataset=chat_rows(), max_steps=4, **options
    )
    whole.train()
    measured = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(measured) == 2 and measured[1] < measured[0]
    resumed = trainer(
        tmp_path / "a", adapted("gemma3"), "gemma3", eval_dataset=chat_rows(), max_steps=4, **options
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-5)
    # Metrics take logits of rows.
    seen = []
    whole.compute_metrics = lambda p: seen.append(p.predictions.shape) or {"rows": len(p.predictions)}
    assert whole.evaluate()["eval_rows"] == 3 and len(seen[0]) == 3


def test_answers_only_in_three_ways(tmp_path):
    given = VisionDataCollator(adapted("qwen2_vl"), tiny_processor("qwen2_vl"), responses_only=True)
    later = trainer(tmp_path / "later", adapted("qwen2_vl"), "qwen2_vl")
    train_on_responses_only(later)
    runs = [
        trainer(tmp_path / "given", given.model, "qwen2_vl", data_collator=given),
        trainer(tmp_path / "asked", adapted("qwen2_vl"), "qwen2_vl", assistant_only_loss=True),
        later,
    ]
    for run in runs:
        run.train()
    first = [losses(run)[0] for run in runs]
    assert first == pytest.approx([first[0]] * 3, rel=1e-6)
    all_tokens = trainer(tmp_path / "all", adapted("qwen2_vl"), "qwen2_vl")
    all_tokens.train()
    assert abs(losses(all_tokens)[0] - first[0]) > 1e-3


def test_text_rows_alone_train_as_ever(tmp_path):
    """As streams of static shape, which a GPU captures; with the collator for text and with that for images."""
    runs = [
        trainer(tmp_path / "text", adapted("qwen3_vl"), "qwen3_vl", rows=chats(), max_steps=3),
        trainer(
            tmp_path / "images", (model := adapted("qwen3_vl")), "qwen3_vl", rows=chats(), max_steps=3,
            data_collator=VisionDataCollator(model, tiny_processor("qwen3_vl")),
        ),
    ]  # fmt: skip
    for run in runs:
        run.train()
        assert run._steps._step.reason is None and losses(run)[-1] < losses(run)[0]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)


def test_a_collator_of_ones_own_gives_padded_rows(tmp_path):
    """As examples for TRL write it: what the processor gives, and labels."""
    processor = tiny_processor("gemma3")

    def collate(rows):
        texts = [processor.apply_chat_template(row["messages"]) for row in rows]
        parts = [[part for message in row["messages"] for part in message["content"]] for row in rows]
        images = [[part["image"] for part in row if part["type"] == "image"] for row in parts]
        batch = processor(
            text=texts, images=images, padding=True, add_special_tokens=False, return_tensors="pt"
        )
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    run = trainer(tmp_path, adapted("gemma3"), "gemma3", data_collator=collate, max_steps=3)
    run.train()
    assert losses(run)[-1] < losses(run)[0] and not binding_of(run.model)._told
    assert "the batch has attention_mask" in run._steps._step.reason


def test_a_model_without_a_family_trains_on_its_stock_forward(tmp_path, caplog):
    model = add_adapter(tiny_llava(), target_modules=r".*language_model.*(q|v)_proj")
    processor = tiny_llava_processor()
    run = SFTTrainer(
        model=model,
        args=settings(tmp_path, max_steps=3),
        train_dataset=chat_rows() * 4,
        processing_class=processor,
    )
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert "'llava' has no family file" in caplog.text


def test_what_is_refused(tmp_path):
    with pytest.raises(TokenizerProblem, match="the rows hold images, and"):
        SFTTrainer(
            model=adapted("qwen2_vl"),
            args=settings(tmp_path),
            train_dataset=chat_rows(),
            processing_class=tiny_tokenizer(),
        )
    with pytest.raises(DatasetUnusable, match="packing"):
        trainer(tmp_path, adapted("qwen2_vl"), "qwen2_vl", packing=True)
    rows = chat_rows()
    rows[0]["messages"][0]["content"][0]["image"] = "gone.png"
    with pytest.raises(ImageUnreadable, match=r"gone\.png"):
        trainer(tmp_path, adapted("qwen2_vl"), "qwen2_vl", rows=rows).train()


def test_a_loss_that_is_no_number_is_explained(tmp_path, caplog):
    model = adapted("qwen2_5_vl")
    with torch.no_grad():
        model.get_base_model().model.visual.blocks[1].attn.qkv.weight[0, 0] = float("nan")
    with pytest.raises(Exception, match=r"visual\.blocks\.1\.attn\.qkv"):
        trainer(tmp_path, model, max_steps=2).train()
