"""Training: two losses over a whole step, an over-fitted row that is generated again, a checkpoint to go on from."""

import numpy as np
import pytest
import torch

from pronghorn.errors import DatasetUnusable
from pronghorn.speech import (
    SpeechConfig,
    SpeechRows,
    SpeechTrainer,
    add_speech_adapter,
    generate_codes,
    load_speech,
    save_speech,
)
from pronghorn.speech.generate import GREEDY
from tests.speech.tiny import BOOKS, random_codes, save_speech_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_speech_tiny(tmp_path_factory.mktemp("speech"))


def make(folder, out, rows=4, model=None, evaluated=False, **settings):
    model, tokenizer = model or load_speech(folder)
    if not hasattr(model, "peft_config"):
        model = add_speech_adapter(model, r=8, lora_alpha=16)
    maker = SpeechRows(model.get_base_model().config, tokenizer)
    made = [maker.row({"text": f"Row {i}", "codes": random_codes(1 + 2 * i, seed=i)}) for i in range(rows)]
    values = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True} | settings
    args = SpeechConfig(output_dir=str(out), **values)
    return SpeechTrainer(model, args, tokenizer, made, made if evaluated else None)


def gradients_of(trainer):
    """Gradients of the first step, before it is clipped or taken."""
    found = {}
    trainer.create_optimizer = lambda *a, **k: setattr(
        trainer, "optimizer", Kept(trainer.model.parameters(), found, trainer.model)
    )
    trainer.train()
    return found, trainer.state.log_history[0]


class Kept(torch.optim.SGD):
    def __init__(self, parameters, found, model):
        super().__init__([p for p in parameters if p.requires_grad], lr=0.0)
        self.found, self.model = found, model

    def step(self, closure=None):
        self.found |= {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def test_micro_batches_of_any_size_make_the_same_step(folder, tmp_path):
    """Rows of 1, 3, 5 and 7 frames: means of means would differ."""
    whole, log = gradients_of(make(folder, tmp_path, per_device_train_batch_size=4, max_grad_norm=0.0))
    parts, logged = gradients_of(
        make(
            folder, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_grad_norm=0.0
        )
    )
    assert whole and set(whole) == set(parts)
    for name, gradient in whole.items():
        # fp32: sums in another order.
        torch.testing.assert_close(
            parts[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in ("loss", "token_loss", "code_loss", "token_accuracy", "code_accuracy"):
        assert logged[name] == pytest.approx(log[name], rel=1e-4)
    assert log["loss"] == pytest.approx(log["token_loss"] + log["code_loss"], rel=1e-4)
    assert log["code_loss"] > np.log(2)


def test_the_weight_of_the_codes(folder, tmp_path):
    _, log = gradients_of(make(folder, tmp_path, code_weight=0.25, per_device_train_batch_size=4))
    assert log["loss"] == pytest.approx(log["token_loss"] + 0.25 * log["code_loss"], rel=1e-4)


def test_evaluation_is_over_all_tokens(folder, tmp_path):
    one = make(folder, tmp_path, evaluated=True, per_device_eval_batch_size=4).evaluate()
    many = make(folder, tmp_path, evaluated=True, per_device_eval_batch_size=1).evaluate()
    assert one["eval_loss"] == pytest.approx(one["eval_token_loss"] + one["eval_code_loss"])
    for name in ("eval_loss", "eval_token_loss", "eval_code_loss"):
        assert many[name] == pytest.approx(one[name], rel=1e-5)


def test_an_over_fitted_row_is_generated_again(folder, tmp_path):
    torch.manual_seed(0)
    model, tokenizer = load_speech(folder)
    trainer = make(
        folder, tmp_path, rows=1, model=(add_speech_adapter(model, r=16, lora_alpha=32), tokenizer),
        max_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1000,
    )  # fmt: skip
    codes = random_codes(8, seed=3)
    maker = SpeechRows(model.config, tokenizer)
    trainer.train_dataset = [maker.row({"text": "Say this.", "codes": codes})]
    trainer.args.max_steps = 60
    trainer.train()
    spoken = generate_codes(trainer.model, tokenizer, "Say this.", sampling=GREEDY)
    assert spoken.tolist() == codes.tolist()
    again = generate_codes(trainer.model, tokenizer, "Say this.", sampling=GREEDY, max_frames=5)
    assert again.tolist() == codes[:, :5].tolist()


def test_going_on_from_a_checkpoint_is_as_if_never_stopped(folder, tmp_path):
    settings = {"per_device_train_batch_size": 2, "lr_scheduler_type": "constant", "seed": 5}
    straight = make(folder, tmp_path / "a", max_steps=4, **settings)
    straight.train()
    make(
        folder, tmp_path / "b", max_steps=2, **settings | {"save_strategy": "steps", "save_steps": 2}
    ).train()
    resumed = make(folder, tmp_path / "b", max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (name, one), other in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_gradient_checkpointing_is_a_save_level(folder, tmp_path):
    from pronghorn.engine import binding_of

    trainer = make(folder, tmp_path, gradient_checkpointing=True)
    base = trainer.model.get_base_model()
    assert all(set(binding_of(half).save_levels) == {"none"} for half in (base.slow, base.fast))
    trainer.train()


def test_no_rows(folder, tmp_path):
    with pytest.raises(DatasetUnusable):
        make(folder, tmp_path, rows=0)


def train_whole(folder, out, steps, checkpoint=None):
    model, tokenizer = load_speech(folder)
    model.requires_grad_(True)
    maker = SpeechRows(model.config, tokenizer)
    rows = [maker.row({"text": "a", "codes": random_codes(4, seed=seed)}) for seed in range(3)]
    args = SpeechConfig(
        output_dir=str(out), max_steps=steps, save_steps=1, use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=1, lr_scheduler_type="constant",
    )  # fmt: skip
    SpeechTrainer(model, args, tokenizer, rows).train(resume_from_checkpoint=checkpoint)
    return model, tokenizer


def test_whole_model(folder, tmp_path):
    """Without an adapter every weight is trained, saved, gone on with, and written as it was published."""
    before = dict(load_speech(folder)[0].named_parameters())
    straight, tokenizer = train_whole(folder, tmp_path / "a", 2)
    resumed, _ = train_whole(folder, tmp_path / "b", 2, str(tmp_path / "a" / "checkpoint-1"))
    written, _ = load_speech(save_speech(straight, tokenizer, tmp_path / "written"))
    assert len(before) > 40
    others = [dict(model.named_parameters()) for model in (resumed, written)]
    for name, parameter in straight.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert all(torch.equal(parameter, other[name]) for other in others), name


def test_bfloat16(folder, tmp_path):
    """What a GPU gets: weights in bf16, the adapter in fp32."""
    loaded = load_speech(folder, dtype=torch.bfloat16)
    trainer = make(
        folder, tmp_path, model=loaded, max_steps=15, learning_rate=1e-2, per_device_train_batch_size=4
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "token_loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    plain = make(folder, tmp_path, per_device_train_batch_size=4)
    plain.train()
    # 8 bits of mantissa through two layers and two more.
    assert losses[0] == pytest.approx(plain.state.log_history[0]["loss"], rel=0.02)
    assert generate_codes(trainer.model, loaded[1], "Row 0", sampling=GREEDY, max_frames=2).shape[0] == BOOKS
