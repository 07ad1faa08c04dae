"""The steps of ``pronghorn quickstart``, each a few calls of the Python interface."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from pronghorn import FastLanguageModel, SFTConfig, SFTTrainer
from pronghorn.cli.console import say
from pronghorn.cli.quickstart_plan import Plan
from pronghorn.data.docstrings import DocRow
from pronghorn.engine import base_causal_lm, binding_of
from pronghorn.export import Export, save_adapter, save_merged
from pronghorn.inference import Sampling, generate

ANSWER_TOKENS = 40


def load(model_file: Path, plan: Plan, seed: int) -> tuple[Any, Any]:
    """(model with a new adapter, tokenizer)."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(model_file), max_seq_length=plan.max_length, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        use_gradient_checkpointing=False,
        random_state=seed,
    )
    return model, tokenizer


def describe(model: Any) -> str:
    """Sizes, dtype and whether the fast path is on, in one line."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    binding = binding_of(model)
    if binding is None or not binding.bound:
        path = "stock forward"
    else:
        path = f"{len(binding.layers)} {binding.family.name} layers on the fast path"
    dtype = str(base_causal_lm(model).dtype).removeprefix("torch.")
    return f"{everything / 1e6:.0f}M parameters in {dtype}, {trained / 1e6:.1f}M of them trained, {path}"


def make_trainer(
    model: Any,
    tokenizer: Any,
    train_rows: list[DocRow],
    held_rows: list[DocRow],
    plan: Plan,
    folder: Path,
    seed: int,
) -> Any:
    """A trainer on the answers alone, for as long as the plan says."""
    settings = SFTConfig(
        output_dir=str(folder / "checkpoints"),
        max_steps=plan.steps or -1,
        num_train_epochs=1,
        per_device_train_batch_size=plan.rows_per_step,
        per_device_eval_batch_size=plan.rows_per_step,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_length=plan.max_length,
        assistant_only_loss=True,
        # Few different sizes: a CPU prepares its matrix products once for each.
        pad_to_multiple_of=128,
        logging_steps=max(1, (plan.steps or 100) // 12),
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=False,
        report_to="none",
        seed=seed,
    )
    return SFTTrainer(
        model=model,
        args=settings,
        processing_class=tokenizer,
        train_dataset=_dataset(train_rows),
        eval_dataset=_dataset(held_rows),
        callbacks=[TimeLimit(plan.seconds)] if plan.seconds else None,
    )


class TimeLimit(TrainerCallback):
    """Ends the training after the step in which ``seconds`` have passed, and says so."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.started > self.seconds and state.global_step < state.max_steps:
            say(
                f"stopped after {state.global_step} of {state.max_steps} steps: "
                f"the {self.seconds:.0f} s that training may take have passed"
            )
            control.should_training_stop = True


def _dataset(rows: Iterable[DocRow]) -> Dataset:
    return Dataset.from_list([{"messages": row.messages()} for row in rows])


def held_back_loss(trainer: Any) -> float:
    """Mean cross-entropy a supervised token of the held-back rows, in nats."""
    return float(trainer.evaluate()["eval_loss"])


def trained_tokens(history: list[Mapping[str, float]]) -> int | None:
    """Tokens that went through training, from the trainer's log."""
    counts = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
    return int(max(counts)) if counts else None


def answers(model: Any, tokenizer: Any, rows: list[DocRow]) -> list[str]:
    """The model's own answers, most likely token by token."""
    FastLanguageModel.for_inference(model)
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
    texts = [generate(model, tokenizer, row.messages()[:1], sampling) for row in rows]
    FastLanguageModel.for_training(model)
    return texts


def save(model: Any, tokenizer: Any, folder: Path, held_back: list[DocRow]) -> Export:
    """``folder/adapter`` (a stock PEFT adapter) and ``folder/merged`` (a stock checkpoint), which is loaded again with
    stock Transformers and compared on held-back rows.

    Raises:
        ExportDiffers: it predicts something else than the model with the adapter.
    """
    save_adapter(model, tokenizer, folder / "adapter")
    texts = [tokenizer.apply_chat_template(row.messages(), tokenize=False) for row in held_back]
    return save_merged(model, tokenizer, folder / "merged", held_out=texts)
