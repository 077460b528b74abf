"""Nested values of columns, as a request takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def drop_nulls(value: Any) -> Any:
    """Return a copy of a nested value without the null keys of its structs.

    Arrow gives each struct of a column all the keys that any row has, null where a row lacked the key. So a null key
    and an absent key mean the same, at any depth. Nulls in lists stay.
    """
    if isinstance(value, Mapping):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [drop_nulls(item) for item in value]
    return value
