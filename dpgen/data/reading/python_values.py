"""Turn Arrow values into Python's, whatever the type, with nothing cut off; and change types inside of types.

- A time in nanoseconds becomes text, since Python's `time` would cut it off.
- A date or time that Python can't hold, before the year 1 or after 9999, becomes text; other rows keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa


def to_python_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return an array's values; those stored as JSON text stay text."""
    plain_type = replace_leaf_types(array.type, _replace_nanosecond_time)
    if plain_type != array.type:
        array = array.cast(plain_type)
    try:
        values: list[Any] = array.to_pylist()
    except (ValueError, OverflowError):
        return [_to_python_value(array.slice(index, 1)) for index in range(len(array))]
    return values


def get_item_type(type: pa.DataType) -> pa.DataType | None:
    """Return the type of a list's items, for any kind of list; None for other types, maps included."""
    is_list = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return type.value_type if any(is_kind(type) for is_kind in is_list) else None


def replace_leaf_types(type: pa.DataType, replace: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Return a type whose leaves, inside lists and structs, are replaced; the same type if none changes."""
    if pa.types.is_struct(type):
        fields = [field.with_type(replace_leaf_types(field.type, replace)) for field in type]
        return pa.struct(fields) if fields != list(type) else type
    item_type = get_item_type(type)
    if item_type is None:
        return replace(type)
    new_type = replace_leaf_types(item_type, replace)
    if new_type == item_type:
        return type
    item = type.value_field.with_type(new_type)
    if pa.types.is_fixed_size_list(type):
        return pa.list_(item, type.list_size)
    return pa.large_list(item) if pa.types.is_large_list(type) else pa.list_(item)


def _to_python_value(one: pa.Array | pa.ChunkedArray) -> Any:
    try:
        return one.to_pylist()[0]
    except (ValueError, OverflowError):
        return one.cast(replace_leaf_types(one.type, _replace_date)).to_pylist()[0]


def _replace_nanosecond_time(type: pa.DataType) -> pa.DataType:
    return pa.string() if type == pa.time64("ns") else type


def _replace_date(type: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_date(type) or pa.types.is_timestamp(type) else type
