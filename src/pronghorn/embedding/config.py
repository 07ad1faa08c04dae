"""`EmbeddingConfig`: Transformers' TrainingArguments with what a contrastive training needs besides."""

from __future__ import annotations

from dataclasses import dataclass, field

import transformers

from pronghorn.embedding.losses import LOSSES, SCORED, UNSCORED, Objective
from pronghorn.errors import UnknownArgument, nearest
from pronghorn.training.config import check_budget, settle_device

AUTO = "auto"


@dataclass
class EmbeddingConfig(transformers.TrainingArguments):
    """Transformers' TrainingArguments. Defaults that differ: `output_dir` "outputs", batches of 64 rows, a learning
    rate of 2e-4 with a tenth of the steps to warm up, a log every 10 steps.

    A batch's rows are each other's negatives, so `per_device_train_batch_size` is part of the loss, not of the memory
    alone: to save memory leave it and set `gradient_cache_texts`. `gradient_accumulation_steps` adds up batches that do
    not see each other.
    """

    output_dir: str | None = field(default="outputs", metadata={"help": "Where checkpoints go."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Rows of a batch."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Rows of a batch of the loss."})
    learning_rate: float = field(default=2e-4, metadata={"help": "The largest learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or their share, to warm up."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})
    loss: str = field(
        default=AUTO,
        metadata={"help": f"One of {', '.join(LOSSES)}; 'auto': info_nce, or cosent for rows with scores."},
    )
    scale: float = field(default=20.0, metadata={"help": "Factor of cosines: 1 / temperature."})
    symmetric: bool = field(
        default=False, metadata={"help": "info_nce: documents are to find their queries, too."}
    )
    margin: float = field(default=0.2, metadata={"help": "triplet: cosine between positive and negative."})
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Train vectors of these lengths, too: their first elements."}
    )
    gradient_cache_texts: int | None = field(
        default=None,
        metadata={"help": "Texts that run at a time; the batch's gradient is the same, its memory theirs."},
    )
    memory_budget: str | None = field(
        default=None, metadata={"help": "GPU memory that save levels are planned for: '8GiB', or 'auto'."}
    )
    query_prompt: str | None = field(
        default=None, metadata={"help": "Put in front of anchors; left out: the model's own 'query' prompt."}
    )
    document_prompt: str | None = field(
        default=None,
        metadata={"help": "Put in front of the others; left out: the model's 'document' prompt."},
    )

    def __post_init__(self) -> None:
        if self.loss not in (AUTO, *LOSSES):
            raise UnknownArgument(
                f"loss='{self.loss}' does not exist",
                fix=nearest(self.loss, LOSSES) or f"use auto, {', '.join(LOSSES)}",
            )
        for name in ("scale", "margin"):
            if not getattr(self, name) > 0:
                raise UnknownArgument(
                    f"{name}={getattr(self, name)!r} is not positive", fix=f"leave out {name}"
                )
        if self.gradient_cache_texts is not None and self.gradient_cache_texts < 1:
            raise UnknownArgument(
                f"gradient_cache_texts={self.gradient_cache_texts} texts cannot run",
                fix="use 1 or more, or None",
            )
        self.remove_unused_columns = False
        check_budget(self.memory_budget)
        settle_device(self)
        super().__post_init__()

    def objective(self, scored: bool, width: int) -> Objective:
        """The loss for rows with or without scores, and vectors of `width` elements.

        Raises:
            UnknownArgument: for a loss that does not fit the rows, or lengths that vectors do not have.
        """
        fitting = SCORED if scored else UNSCORED
        name = fitting[0] if self.loss == AUTO else self.loss
        if name not in fitting:
            rows = "rows with a score" if scored else "rows without a score"
            raise UnknownArgument(f"loss='{name}' is not for {rows}", fix=f"use {' or '.join(fitting)}")
        dims = tuple(self.matryoshka_dims or ())
        if any(not 0 < dim <= width for dim in dims):
            raise UnknownArgument(
                f"matryoshka_dims={list(dims)}: vectors have {width} elements",
                fix=f"use numbers from 1 to {width}",
            )
        return Objective(name, self.scale, self.symmetric, self.margin, dims)
