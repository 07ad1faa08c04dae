"""TRL's own trainers on a bound model: the stock one's numbers, under older arguments."""

import pickle

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from pronghorn import FastLanguageModel, binding_of
from pronghorn.compat import models
from pronghorn.compat.aliases import DropIn
from pronghorn.compat.names import INSTEAD, LATER
from pronghorn.errors import DropInUnavailable, NotInDropIn, UnknownArgument

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="the trainer would take the GPU, the tiny model the CPU"
    ),
    pytest.mark.filterwarnings("ignore"),
]
PAIRS = Dataset.from_list(
    [{"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " no"} for i in range(8)]
)
HOW = {
    "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none",
    "output_dir": "out", "disable_tqdm": True, "save_strategy": "no", "warmup_ratio": 0.0, "seed": 1,
}  # fmt: skip


def trained(tiny, method, *, bound, **given):
    """Losses of three steps, in fp32."""
    with DropIn():
        import trl

        config, trainer = getattr(trl, f"{method}Config"), getattr(trl, f"{method}Trainer")
    model, tokenizer = FastLanguageModel.from_pretrained(tiny, dtype="float32", load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    if not bound:
        binding_of(model).undo()
    made = trainer(
        model=model, args=config(**HOW, max_prompt_length=32), train_dataset=PAIRS, tokenizer=tokenizer, **given
    )  # fmt: skip
    made.train()
    return made, [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["DPO", "ORPO"])
def test_losses_are_those_of_the_stock_model(tiny, method):
    fast, ours = trained(tiny, method, bound=True, beta=0.2, max_length=64)
    _, stock = trained(tiny, method, bound=False, beta=0.2, max_length=64)
    assert len(ours) == 3 and len(set(ours)) == 3
    # The log rounds to about six digits; three steps at a rate of 1e-2 multiply fp32's differences by little.
    assert ours == pytest.approx(stock, rel=2e-4)
    assert (fast.args.beta, fast.args.max_length, fast.args.bf16) == (0.2, 64, False)
    assert type(pickle.loads(pickle.dumps(fast.args))) is type(fast.args)


def test_what_no_version_has_is_refused(tiny):
    with DropIn():
        from trl import DPOConfig
    with pytest.raises(TypeError, match="betta"):
        DPOConfig(**HOW, betta=0.1)


def test_later_names_are_found_by_the_users_code_alone():
    import trl as real

    with DropIn():
        import trl

        for name, home in LATER["trl"].items():
            assert getattr(trl, name).__module__ == home.partition(":")[0]
            assert getattr(trl, name) is getattr(trl, name)
    assert not hasattr(real, "ORPOTrainer")
    assert real.DPOTrainer.__module__.startswith("trl.")


@pytest.mark.parametrize("given", [{"auto_model": AutoModelForSequenceClassification}, {"num_labels": 3}])
def test_models_without_text_are_refused(tiny, given):
    with pytest.raises(DropInUnavailable, match="predicts no text"):
        models.FastModel.from_pretrained(tiny, **given)


@pytest.mark.parametrize("name", INSTEAD)
def test_what_to_do_instead_is_said(name):
    with DropIn():
        import unsloth

        with pytest.raises(NotInDropIn) as caught:
            getattr(unsloth, name)
    assert caught.value.fix == INSTEAD[name]


def test_forms_of_saving_that_scripts_ask_for(tiny, tmp_path):
    model, tokenizer = models.FastLanguageModel.from_pretrained(tiny, load_in_4bit=False)
    model = models.FastLanguageModel.get_peft_model(model, r=2)
    model.save_lora(str(tmp_path / "lora"))
    assert (tmp_path / "lora" / "adapter_config.json").exists()
    model.save_pretrained_merged(str(tmp_path / "four"), tokenizer, save_method="merged_4bit_forced")
    assert "quantization_config" in (tmp_path / "four" / "config.json").read_text()
    with pytest.raises(UnknownArgument, match="quantisation_method"):
        model.save_pretrained_gguf("out", tokenizer, quantisation_method="q8_0")
