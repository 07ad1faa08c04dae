"""The loss and the gradient of a step: those of stock TRL, however the rows are grouped."""

from __future__ import annotations

import pytest
import torch
import trl
from transformers import DogeConfig, DogeForCausalLM, GPT2Config, GPT2LMHeadModel

from pronghorn.engine import binding_of
from pronghorn.errors import UnknownArgument
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.runs import adapter_model, chats, losses, settings, trained, trainer

# Float32 sums in another order: a few hundred terms of relative error 6e-8 each.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def stock_step(folder, rows):
    """Loss and parameters of one SGD step of TRL's own trainer on padded rows."""
    model = adapter_model(bound=False)
    args = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=len(rows),
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    run = trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tiny_tokenizer())
    run.train()
    return losses(run)[0], trained(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU TRL's loss is Triton, on CPU tensors too")
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_a_step_is_that_of_stock_trl(tmp_path, packing):
    rows = chats(12)
    loss, parameters = stock_step(tmp_path / "stock", rows)
    run = trainer(
        tmp_path / "ours", rows=rows, packing=packing, per_device_train_batch_size=12, max_length=128
    )
    assert ("seq_lengths" in run.train_dataset.column_names) == packing
    before = trained(run.model)
    run.train()
    assert losses(run)[0] == pytest.approx(loss, rel=1e-5)
    assert any(not torch.equal(before[name], value) for name, value in parameters.items())
    same(parameters, trained(run.model))


def test_accumulation_is_the_whole_batch(tmp_path):
    whole = trainer(tmp_path / "a", per_device_train_batch_size=4, assistant_only_loss=True)
    parts = trainer(
        tmp_path / "b",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        assistant_only_loss=True,
    )
    whole.train()
    parts.train()
    assert losses(whole)[0] == pytest.approx(losses(parts)[0], rel=1e-5)
    same(trained(whole.model), trained(parts.model))
    for name in ("mean_token_accuracy", "num_tokens"):
        assert whole.state.log_history[0][name] == pytest.approx(parts.state.log_history[0][name])


def test_a_last_short_accumulation_counts_its_own_tokens(tmp_path):
    """Five rows in steps of two: the last step has one micro-batch."""
    run = trainer(
        tmp_path, rows=chats(5), max_steps=-1, num_train_epochs=1, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, learning_rate=0.0,
    )  # fmt: skip
    run.train()
    assert len(losses(run)) == 3
    assert all(4.0 < loss < 8.0 for loss in losses(run))


def test_evaluation_is_exact_for_any_batch_size(tmp_path):
    """The mean over tokens, where a mean of batch means would depend on the batches."""
    results = {
        size: trainer(tmp_path / str(size), eval_dataset=chats(7), per_device_eval_batch_size=size).evaluate()
        for size in (1, 3, 7)
    }
    model = adapter_model(bound=False)
    tokenizer = tiny_tokenizer()
    total, count = 0.0, 0
    for row in chats(7):
        ids = torch.tensor([tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    for result in results.values():
        assert result["eval_loss"] == pytest.approx(total / count, rel=1e-5)
        assert 0.0 <= result["eval_mean_token_accuracy"] <= 1.0


def test_evaluation_before_and_during_training(tmp_path):
    run = trainer(
        tmp_path,
        eval_dataset={"one": chats(3), "two": chats(5)},
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    run.evaluate()
    run.train()
    logged = [entry for entry in run.state.log_history if "eval_one_loss" in entry]
    assert len(logged) == 2
    assert logged[0]["eval_one_loss"] != logged[1]["eval_one_loss"]
    assert run.evaluate(chats(2))["eval_loss"] > 0


def test_metrics_get_logits_of_rows(tmp_path):
    seen = {}

    def metrics(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"rows": len(prediction.predictions)}

    run = trainer(tmp_path, eval_dataset=chats(5), compute_metrics=metrics, per_device_eval_batch_size=2)
    result = run.evaluate()
    assert result["eval_rows"] == 5
    assert seen["shapes"][0][:2] == seen["shapes"][1]
    assert seen["shapes"][0][2] == 320
    plain = trainer(tmp_path, eval_dataset=chats(5)).evaluate()["eval_loss"]
    assert result["eval_loss"] == pytest.approx(plain, rel=1e-5)


def test_metrics_see_every_document_where_evaluation_would_be_packed(tmp_path):
    """Transformers cuts a metric's rows to the number of the data set's, which packed rows unpack to more than."""
    seen = {}

    def metrics(prediction):
        seen["rows"] = len(prediction.predictions)
        return {}

    rows = [{"text": "why " * (1 + 3 * i % 7)} for i in range(11)]
    run = trainer(
        tmp_path, rows=rows, eval_dataset=rows, packing=True, max_length=128, compute_metrics=metrics
    )
    run.evaluate()
    assert len(run.train_dataset) < 11 and seen["rows"] == 11


def test_accuracy_where_the_head_runs_through_its_own_forward(tmp_path):
    hooked = adapter_model()
    hooked.get_base_model().lm_head.register_forward_hook(lambda *_: None)
    accuracies = []
    for model in (adapter_model(), hooked):
        run = trainer(tmp_path, model=model, max_steps=8, learning_rate=1.0, logging_steps=8)
        run.train()
        accuracies.append(run.state.log_history[0]["mean_token_accuracy"])
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.02) and accuracies[0] > 0.05


def test_dft_label_smoothing_and_own_loss_go_through_logits(tmp_path):
    plain = trainer(tmp_path, learning_rate=0.0)
    plain.train()
    for options in ({"loss_type": "dft"}, {"label_smoothing_factor": 0.1}):
        run = trainer(tmp_path, learning_rate=0.0, **options)
        run.train()
        assert 0 < losses(run)[0] != pytest.approx(losses(plain)[0])


class TestUnboundModel:
    """A family that the engine does not know trains on its stock forward and padded batches."""

    def model(self):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=320, n_positions=128, n_embd=32, n_layer=1, n_head=2,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip

    @pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
    def test_loss_is_the_mean_over_tokens(self, tmp_path, packing):
        rows = chats(6)
        model = self.model()
        expected, count = 0.0, 0
        for row in rows:
            ids = tiny_tokenizer().apply_chat_template(row["messages"], return_dict=True, return_tensors="pt")
            with torch.no_grad():
                loss = model(input_ids=ids["input_ids"], labels=ids["input_ids"]).loss.item()
            expected += loss * (ids["input_ids"].shape[1] - 1)
            count += ids["input_ids"].shape[1] - 1
        run = trainer(
            tmp_path, model, rows, packing=packing, max_length=120, per_device_train_batch_size=6,
            gradient_checkpointing=True,
        )  # fmt: skip
        batch = run.data_collator([run.train_dataset[0]])
        assert "attention_mask" in batch and "cu_seq_lens_q" not in batch
        run.train()
        assert losses(run)[0] == pytest.approx(expected / count, rel=1e-5)
        assert (
            run.args.gradient_checkpointing
            and run.args.gradient_checkpointing_kwargs["use_reentrant"] is False
        )


@pytest.mark.parametrize("checkpointing,level", [(None, "offload"), (True, "none"), (False, "all")])
def test_a_stock_model_is_bound_by_the_trainer(tmp_path, checkpointing, level):
    bound = trainer(tmp_path / "a")
    stock = trainer(
        tmp_path / "b", adapter_model(bound=False), max_steps=1, gradient_checkpointing=checkpointing
    )
    assert set(binding_of(stock.model).save_levels) == {level}
    bound.train()
    stock.train()
    assert losses(bound)[0] == pytest.approx(losses(stock)[0], rel=1e-5)


def test_bfloat16_and_autocast_work_without_a_gpu(tmp_path):
    plain = trainer(tmp_path, learning_rate=0.0)
    plain.train()
    mixed = trainer(tmp_path, learning_rate=0.0, bf16=True)
    mixed.train()
    low = trainer(tmp_path, adapter_model().to(torch.bfloat16), learning_rate=0.0)
    low.train()
    for run in (mixed, low):
        assert losses(run)[0] == pytest.approx(losses(plain)[0], rel=0.02)


def test_full_finetuning(tmp_path):
    from pronghorn.engine import bind

    model = tiny_model("qwen2")
    bind(model)
    run = trainer(tmp_path, model, max_steps=8, learning_rate=0.3)
    run.train()
    assert losses(run)[-1] < losses(run)[0]


def test_settings_of_the_tests_are_plain(tmp_path):
    assert settings(tmp_path).bf16 is False


def test_a_config_with_a_weight_for_a_balance_that_the_model_does_not_give(tmp_path):
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        model = DogeForCausalLM(DogeConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    run = trainer(tmp_path, model)
    run.train()
    assert run.aux_loss_enabled and losses(run)[0] == pytest.approx(5.8, abs=0.3)  # about ln(320)


def test_a_streams_last_batches_are_no_part_of_another_step(tmp_path):
    """Six rows, four a step: the two that are left begin the next round, with the divisor of their own step."""
    rows = chats(6)
    given = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "learning_rate": 0.0,
        "max_steps": 3,
    }
    run = trainer(tmp_path / "stream", rows=rows.to_iterable_dataset(), shuffle_dataset=False, **given)
    run.train()
    # two rounds of the six rows in order are the three steps
    batches = [[*rows, *rows][begin : begin + 4] for begin in (0, 4, 8)]
    given |= {"max_steps": 1}
    expected = []
    for number, batch in enumerate(batches):
        whole = trainer(tmp_path / str(number), rows=batch, **given)
        whole.train()
        expected += losses(whole)
    assert losses(run) == pytest.approx(expected, abs=1e-4)


def test_a_stream_that_is_shorter_than_a_step(tmp_path):
    rows = chats(3).to_iterable_dataset()
    run = trainer(
        tmp_path, rows=rows, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1
    )
    with pytest.raises(UnknownArgument, match="the stream has 3"):
        run.train()
