"""The trainer as scripts for Unsloth know it."""

from __future__ import annotations

import logging
from typing import Any

import transformers

from pronghorn.data.rows import CHAT_COLUMNS
from pronghorn.data.vision import VisionDataCollator
from pronghorn.engine import base_causal_lm
from pronghorn.loading.arguments import note_without_effect, refuse_unknown
from pronghorn.training import SFTTrainer
from pronghorn.training import train_on_responses_only as mask_responses

logger = logging.getLogger("pronghorn")

#: arguments of Unsloth's collator that have nothing to switch here
_WITHOUT_EFFECT = frozenset(
    {"ignore_index", "force_match", "num_proc", "completion_only_loss", "pad_to_multiple_of", "resize_dimension",
     "snap_to_patch_size"}
)  # fmt: skip


#: columns of rows that are not text alone
_OTHER = frozenset({"input_ids", "image", "images"})

_OF_THE_COLLATOR = frozenset({"ignore_index", "mlm", "mlm_probability", "padding_free", "pad_to_multiple_of"})


class ScriptTrainer(SFTTrainer):
    """`pronghorn.SFTTrainer` with what scripts ask of it: an embedding learning rate, and texts that they have made.

    Where rows have both a conversation and the text field, scripts have rendered the one into the other, perhaps in a
    format of their own: it is the text that is trained on.
    """

    def __init__(
        self, model: Any = None, args: Any = None, data_collator: Any = None, train_dataset: Any = None,
        eval_dataset: Any = None, *more: Any, **given: Any,
    ) -> None:  # fmt: skip
        if given.get("formatting_func") is None and not getattr(args, "assistant_only_loss", False):
            field = given.get("dataset_text_field") or getattr(args, "dataset_text_field", None) or "text"
            train_dataset, eval_dataset = _texts(train_dataset, field), _texts(eval_dataset, field)
        marks = data_collator if isinstance(data_collator, DataCollatorForCompletionOnlyLM) else None
        data_collator = None if marks is not None else data_collator
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, *more, **given)
        if marks is not None:
            tokenizer = marks.tokenizer or self.processing_class
            instruction, response = marks.texts(tokenizer)
            mask_responses(self, instruction, response, tokenizer=tokenizer)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = getattr(self.args, "embedding_learning_rate", None)
        if rate is not None:
            give_own_rate(optimizer, _embeddings(self.model), rate)
        return optimizer


class DataCollatorForCompletionOnlyLM:
    """A collator of older TRL versions, which trained on what follows a mark: the trainer masks its rows by the marks.

    Args:
        response_template: text, or token ids, behind which an answer begins.
        instruction_template: where it ends, in conversations of several turns.
    """

    def __init__(
        self,
        response_template: Any,
        instruction_template: Any = None,
        *_: Any,
        tokenizer: Any = None,
        **given: Any,
    ) -> None:
        refuse_unknown(given, DataCollatorForCompletionOnlyLM.__init__, _OF_THE_COLLATOR)
        self.marks, self.tokenizer = (instruction_template, response_template), tokenizer

    def texts(self, tokenizer: Any) -> list[str]:
        """Both marks as text, the instruction's first; "" for none."""
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        return [mark if isinstance(mark, str) else inner.decode(mark or []) for mark in self.marks]


class PlainTrainer(transformers.Trainer):
    """Transformers' own, which takes `tokenizer=` as it did before."""

    def __init__(self, *args: Any, tokenizer: Any = None, **given: Any) -> None:
        if tokenizer is not None:
            given.setdefault("processing_class", tokenizer)
        super().__init__(*args, **given)


#: The name in scripts; what `trl.SFTTrainer` is to a script is the same class.
UnslothTrainer = ScriptTrainer


def _texts(rows: Any, field: str) -> Any:
    """Rows without what would be rendered in the text's place."""
    if isinstance(rows, dict):
        return type(rows)({name: _texts(part, field) for name, part in rows.items()})
    columns = getattr(rows, "column_names", None)
    if not isinstance(columns, list) or field not in columns or _OTHER.intersection(columns):
        return rows
    instead = [name for name in columns if name in (*CHAT_COLUMNS, "prompt", "completion") and name != field]
    return rows.remove_columns(instead) if instead else rows


def give_own_rate(optimizer: Any, parameters: list[Any], rate: float) -> None:
    """Move parameters into groups of their own, which differ from those they come from in the learning rate alone.

    To be called before the schedule is made: it multiplies each group's own rate.
    """
    chosen = {id(parameter) for parameter in parameters}
    if any(group.get("has_own_rate") for group in optimizer.param_groups):
        return
    moved = 0
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in chosen]
        if not mine:
            continue
        moved += len(mine)
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        optimizer.add_param_group({**group, "params": mine, "lr": rate, "has_own_rate": True})
    if moved == 0:
        logger.warning(
            "pronghorn: embedding_learning_rate has no effect: neither embed_tokens nor lm_head is trained; "
            "name them in target_modules"
        )


def _embeddings(model: Any) -> list[Any]:
    """Trained parameters of the embedding and the head, whatever PEFT has put around them."""
    base = base_causal_lm(model)
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    found = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    return list({id(p): p for p in found}.values())


class UnslothVisionDataCollator(VisionDataCollator):
    """`pronghorn.VisionDataCollator` with the arguments that scripts give it.

    Args:
        resize: a number is the most pixels that a side may have; "min" and "max" leave it to the processor.
        instruction_part, response_part: with `train_on_responses_only`, as for the function of that name.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_seq_length: int | None = None,
        formatting_func: Any = None,
        resize: str | int = "min",
        train_on_responses_only: bool = False,
        instruction_part: str | None = None,
        response_part: str | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unknown(kwargs, VisionDataCollator.__init__, _WITHOUT_EFFECT)
        note_without_effect(kwargs, "UnslothVisionDataCollator")
        find: Any = train_on_responses_only
        if train_on_responses_only and instruction_part is not None:
            mask = mask_responses(
                None, instruction_part, response_part, tokenizer=processor, return_function=True
            )
            find = mask.responses
        super().__init__(
            model,
            processor,
            max_length=max_seq_length,
            responses_only=find,
            formatting_func=formatting_func,
            max_side=resize if isinstance(resize, int) else None,
        )


def unsloth_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`trainer.train()`; the loss is that of all supervised tokens of a step in any case."""
    return trainer.train(*args, **kwargs)


def nothing_to_patch(*args: Any, **kwargs: Any) -> None:
    """In place of what changed TRL's classes: TRL's own trainers take a bound model as it is."""
