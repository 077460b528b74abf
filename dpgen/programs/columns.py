"""Read a row's columns for the programs here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpgen.programs.handle import CallFailed


def read_text(row: Mapping[str, Any], column: str) -> str:
    """Return the text that a prompt has of a column.

    Raises:
        CallFailed: `wrong_type`: there is no such column, or it is null, which would stand in the prompt as "None".
    """
    if row.get(column) is None:
        what = "is null" if column in row else "is no column"
        raise CallFailed("wrong_type", f"{column} {what}, not a text")
    return str(row[column])
