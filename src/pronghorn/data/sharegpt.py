"""Conversations under other names (ShareGPT's from/value, human/gpt) brought to role and content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from pronghorn.data.rows import CHAT_COLUMNS, ROLES, as_message
from pronghorn.errors import DatasetUnusable, PronghornError, RowInvalid

_KNOWN = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class _Standard:
    """One row with its conversation in plain names; the column keeps its name, other columns stay."""

    column: str
    aliases: Mapping[str, str]

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        conversation = row[self.column]
        try:
            if not isinstance(conversation, list):
                raise RowInvalid(f"'{self.column}' is {type(conversation).__name__}, not a list of messages")
            return {self.column: [self._message(message) for message in conversation]}
        except PronghornError as error:
            error.where = f"row {index}"
            raise

    def _message(self, message: Any) -> dict[str, Any]:
        plain = as_message(message)
        role = self.aliases.get(plain["role"].lower(), plain["role"])
        if role not in _KNOWN:
            raise RowInvalid(
                f"a message has the unknown role '{plain['role']}'",
                fix="say what it is: aliases_for_user=[...], aliases_for_assistant=[...] or aliases_for_system=[...]",
            )
        return {**plain, "role": role}


def standardize_sharegpt(
    dataset: Any,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """Rows whose messages have `role` (system, user, assistant or tool) and `content`.

    Args:
        dataset: a Dataset, a stream, several of them by split, or a list of rows, with the conversations in the column
            `conversations`, `conversation` or `messages`. What is in plain names already stays as it is.
        aliases_for_user: further names of a role, in any case of letters; human, gpt, model, observation and other
            well-known ones need not be told.
        batch_size: rows written at a time.

    Raises:
        DatasetUnusable: there is no column of conversations.
        RowInvalid: a message of an unknown role or without content, with its row.
    """
    if isinstance(dataset, dict):
        return type(dataset)(
            {
                name: standardize_sharegpt(
                    part, aliases_for_system, aliases_for_user, aliases_for_assistant, batch_size, num_proc
                )
                for name, part in dataset.items()
            }
        )
    aliases = dict(ROLES)
    for role, names in (
        ("system", aliases_for_system),
        ("user", aliases_for_user),
        ("assistant", aliases_for_assistant),
    ):
        aliases |= {name.lower(): role for name in names}
    standard = _Standard(_column(dataset), aliases)
    if isinstance(dataset, list):
        return [{**row, **standard(row, index)} for index, row in enumerate(dataset)]
    if isinstance(dataset, Dataset):
        return dataset.map(
            standard,
            with_indices=True,
            writer_batch_size=batch_size,
            num_proc=num_proc,
            desc="Standardising conversations",
        )
    return dataset.map(standard, with_indices=True)


#: The same under its newer name.
standardize_data_formats = standardize_sharegpt


def _column(dataset: Any) -> str:
    if isinstance(dataset, Dataset | IterableDataset) and dataset.column_names:
        columns = list(dataset.column_names)
    else:
        columns = list(next(iter(dataset), {}))
    for name in CHAT_COLUMNS:
        if name in columns:
            return name
    raise DatasetUnusable(
        f"there are no conversations among the columns {', '.join(columns) or '(none)'}",
        fix=f"put them into a column {' or '.join(CHAT_COLUMNS)}",
    )
