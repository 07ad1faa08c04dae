"""The trainer's side of data: rows become tokens, and tokens batches, for each use in its way."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trl

from pronghorn.data.collator import Collator
from pronghorn.data.prepare import Preparation, prepare_dataset
from pronghorn.data.rows import RowFormat, RowRenderer, row_kind
from pronghorn.data.vision import VisionDataCollator
from pronghorn.training.given import as_dataset
from pronghorn.training.setup import is_bound, takes_flat_batches

logger = logging.getLogger("pronghorn")


class RowsTrainer(trl.SFTTrainer):
    """TRL's trainer with this library's rows and batches. `pronghorn.SFTTrainer` sets what it reads here."""

    data_collator: Any
    _signature_columns: Any
    _eval_packing: bool | None
    #: whether batches are made by our collator, not by the user's
    _own_batches: bool
    #: numbers that the rows of train_dataset have where they came from, for messages; None: their places in it
    row_numbers: Sequence[int] | None = None

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """TRL's hook for training and evaluation data, and for data given to `evaluate`."""
        training = dataset is getattr(self, "_given_train", None)
        if not training and self._wants_rows:
            # Transformers counts a metric's rows as the data set's, so each must be one document.
            packing = False
        elif not training and self._eval_packing is not None:
            packing = self._eval_packing
        else:
            packing = self._packing
        form = RowFormat(
            text_field=args.dataset_text_field,
            responses_only=self._responses_only,
            completion_only=args.completion_only_loss,
            vocabulary=self._vocabulary,
        )
        first: dict[str, Any] = next(iter(dataset), {})
        if training and self._responses_only and row_kind(first, form.text_field) == "text":
            logger.warning(
                "pronghorn: plain text has no responses: assistant_only_loss has no effect on these rows"
            )
        preparation = Preparation(
            RowRenderer(self._tokenizer, form),
            max_length=args.max_length,
            keep_end=args.truncation_mode == "keep_end",
            context=self._context,
            packing=packing,
            drop_unsupervised=args.drop_unsupervised_rows,
            workers=args.dataset_num_proc,
            formatting_func=formatting_func,
            shuffle_seed=args.seed if args.shuffle_dataset and training else None,
        )
        with args.main_process_first(desc=f"preparing the {dataset_name} data"):
            prepared = prepare_dataset(dataset, preparation, dataset_name)
        named = "rows" in (prepared.column_names or ("rows",))
        return prepared if self._own_batches or not named else prepared.remove_columns("rows")

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that batches are made of; a row's number is not for the model, but for whoever asks for the row."""
        super()._set_signature_columns_if_needed()
        if "rows" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "rows"]

    def _numbers_of(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Rows of the data as given, by the numbers they are known by."""
        return tuple(rows) if self.row_numbers is None else tuple(self.row_numbers[row] for row in rows)

    def _collator(self) -> Collator:
        return Collator(
            pad_token_id=self._tokenizer.pad_token_id,
            flat=takes_flat_batches(self.model),
            for_engine=is_bound(self.model),
            pad_to_multiple_of=self.args.pad_to_multiple_of,
        )

    @contextmanager
    def _collating(self, **changes: Any) -> Iterator[None]:
        """Another way of making batches, for the data loader that is built inside."""
        collator = self.data_collator
        if isinstance(collator, Collator) and collator.flat:
            self.data_collator = dataclasses.replace(collator, **changes)
        elif isinstance(collator, VisionDataCollator):
            self.data_collator = copy.copy(collator)
            self.data_collator.__dict__.update(changes)
        try:
            yield
        finally:
            self.data_collator = collator

    def get_train_dataloader(self) -> Any:
        with self._collating(budgets=self._static_steps().budgets()):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        # Whoever looks at logits takes them of rows [B, S, V], not of one stream.
        with self._collating(flat=self.compute_metrics is None):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """For `predict`, which takes rows of every kind as `evaluate` does, and returns logits."""
        test_dataset = self._rows_to_predict(test_dataset)
        with self._collating(flat=bool(self.args.prediction_loss_only)):
            return super().get_test_dataloader(test_dataset)

    def _rows_to_predict(self, rows: Any) -> Any:
        """Tokenised where they are not. Never packed: there is one prediction for each row."""
        rows = as_dataset(rows)
        if (
            self._skip_prepare_dataset
            or row_kind(next(iter(rows), {}), self.args.dataset_text_field) == "tokens"
        ):
            return rows
        eval_packing, self._eval_packing = self._eval_packing, False
        try:
            return self._prepare_dataset(
                rows, self.processing_class, self.args, False, self._formatting_func, "test"
            )
        finally:
            self._eval_packing = eval_packing
