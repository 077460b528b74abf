"""Keep text that no encoding can hold out of Arrow, and remember what it was.

Arrow's text is UTF-8. A byte that is not UTF-8 is read as `surrogateescape` of Python reads it, as half of a surrogate
pair, like the lone halves that JSON can spell. The Arrow file gets an escape in their place (`\\udce9`); the row's real
value is kept beside it, so that the row's prompt is rejected as `invalid_text` and no other row is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

# Row of the input → column → the value, as JSON text.
InvalidValues = dict[int, dict[str, str]]

_SURROGATE = re.compile("[\ud800-\udfff]")


def has_surrogate(value: Any) -> bool:
    """Return True if a text in a value can't be encoded."""
    if isinstance(value, str):
        return not value.isascii() and _SURROGATE.search(value) is not None
    if isinstance(value, Mapping):
        return any(has_surrogate(key) or has_surrogate(item) for key, item in value.items())
    return isinstance(value, list) and any(map(has_surrogate, value))


def escape(value: Any) -> Any:
    """Return a value with an escape for each character that can't be encoded."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {escape(key): escape(item) for key, item in value.items()}
    return list(map(escape, value)) if isinstance(value, list) else value


def take_invalid(row: dict[str, Any]) -> dict[str, str]:
    """Escape what can't be encoded in a row, in place, and return its values by column, as JSON text."""
    for name in [name for name in row if has_surrogate(name)]:
        row[escape(name)] = row.pop(name)
    invalid = {name: json.dumps(value) for name, value in row.items() if has_surrogate(value)}
    for name in invalid:
        row[name] = escape(row[name])
    return invalid


def set_aside_invalid(values: list[Any], name: str, first_row: int, invalid: InvalidValues) -> None:
    """Escape what can't be encoded in a column, in place, and add these values to `invalid`.

    Args:
        values: JSON values of neighbouring rows, from row `first_row` on.
    """
    for index, value in enumerate(values):
        if has_surrogate(value):
            text = json.dumps(value)
            value = json.loads(text)  # two halves that are a pair are one character now
            if has_surrogate(value):
                invalid.setdefault(first_row + index, {})[name] = text
            values[index] = escape(value)


def repair_column(column: pa.Array, name: str, first_row: int, invalid: InvalidValues) -> pa.Array:
    """Return an Arrow column whose text may not be UTF-8 as one whose text is; its first row is `first_row`."""
    values = [_decode(value, column.type) for value in column.cast(_to_binary(column.type)).to_pylist()]
    for offset, value in enumerate(values):
        if has_surrogate(value):
            invalid.setdefault(first_row + offset, {})[name] = json.dumps(value, default=str)
            values[offset] = escape(value)
    return pa.array(values, column.type)


def _to_binary(type: pa.DataType) -> pa.DataType:
    if pa.types.is_string(type):
        return pa.binary()
    if pa.types.is_large_string(type):
        return pa.large_binary()
    if pa.types.is_struct(type):
        return pa.struct([(field.name, _to_binary(field.type)) for field in type])
    if pa.types.is_list(type):
        return pa.list_(_to_binary(type.value_type))
    return pa.large_list(_to_binary(type.value_type)) if pa.types.is_large_list(type) else type


def _decode(value: Any, type: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_string(type) or pa.types.is_large_string(type):
        return value.decode("utf-8", "surrogateescape")
    if pa.types.is_struct(type):
        return {field.name: _decode(value[field.name], field.type) for field in type}
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        return [_decode(item, type.value_type) for item in value]
    return value
