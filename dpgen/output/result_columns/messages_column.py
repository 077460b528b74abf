"""Describe the column of conversations with the model's turn."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

from dpgen.output.column_values import get_messages
from dpgen.output.conversations import get_messages_type
from dpgen.output.result_columns.result_column import ResultColumn

if TYPE_CHECKING:
    from dpgen.output.columns import DatasetFormat

MESSAGES = "messages"  # the only column that needs the input as well as the result


def _give_parts(column: ResultColumn, dataset_format: DatasetFormat) -> ResultColumn:
    """Return the column as it is where columns of the input hold images."""
    if dataset_format.messages is None or not dataset_format.messages.has_media_columns:
        return column
    get_type, get = partial(get_messages_type, has_parts=True), partial(get_messages, has_parts=True)
    return dataclasses.replace(column, get_type=get_type, get=get)


MESSAGES_COLUMN = ResultColumn(
    MESSAGES,
    get_messages_type,
    get_messages,
    is_of_sample=False,
    is_present=lambda dataset_format: dataset_format.messages is not None,
    specialize=_give_parts,
)
