"""Find the Arrow types that hold JSON values unchanged, and turn values into arrays of these types and back.

- A value that no plain type holds exactly (objects with different keys, mixed types, numbers beyond 64 bits) becomes
  JSON text, Arrow's `arrow.json`, at the place in the row where the values differ.
- A key that a row lacks is null at the top level only: deeper, objects of one struct have the same keys.
- JSON lines that dpgen wrote have types already, those of a dataset card; there dates, times and decimals are texts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from dpgen.data.reading.python_values import get_item_type, replace_leaf_types, to_python_values

JSON = pa.json_()
_MAX_DEPTH = 20  # Arrow's files allow 64 levels; nobody reads so many as columns
_EXACT_FLOAT = 1 << 53  # each whole number up to this one is a float64

_SCALARS = frozenset([type(None), bool, int, float, str])
_encode = json.JSONEncoder(ensure_ascii=False).encode

Convert = Callable[[Any], Any]


def is_json(value: Any) -> bool:
    """Return True if `json.loads` could return a value; False where a type is only like one of its types."""
    if type(value) is list:
        return all(map(is_json, value))
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(map(is_json, value.values()))
    return type(value) in _SCALARS


class TypeInference:
    """Infer the type of a column from its values.

    Attributes:
        mixes_numbers: True once whole numbers and decimals shared a place, so that all of them became decimals.
    """

    def __init__(self) -> None:
        self.mixes_numbers = False

    def infer(self, values: Sequence[Any], depth: int = 0) -> pa.DataType:
        """Return the type that holds all of the values, which are as `json.loads` returns them."""
        kinds = set(map(type, values))
        kinds.discard(type(None))
        if not kinds:
            return pa.null()
        if kinds == {str}:
            return pa.string()
        if kinds == {bool}:
            return pa.bool_()
        if kinds <= {int, float}:
            return self._infer_number(values, kinds)
        if kinds == {list} and depth < _MAX_DEPTH:
            items = [item for value in values if value is not None for item in value]
            return pa.list_(self.infer(items, depth + 1))
        if kinds == {dict} and depth < _MAX_DEPTH:
            return self._infer_struct([value for value in values if value is not None], depth)
        return JSON

    def _infer_number(self, values: Sequence[Any], kinds: set[type]) -> pa.DataType:
        if kinds == {float}:
            return pa.float64()
        whole = [value for value in values if type(value) is int]
        smallest, largest = min(whole), max(whole)
        if float in kinds:
            if max(-smallest, largest) > _EXACT_FLOAT:
                return JSON
            self.mixes_numbers = True
            return pa.float64()
        if smallest >= -(1 << 63) and largest < 1 << 63:
            return pa.int64()
        return pa.uint64() if smallest >= 0 and largest < 1 << 64 else JSON

    def _infer_struct(self, objects: Sequence[dict[str, Any]], depth: int) -> pa.DataType:
        keys = objects[0].keys()
        if not keys or any(value.keys() != keys for value in objects) or any("\0" in key for key in keys):
            return JSON  # Arrow's files cut a name at a zero character
        return pa.struct([(key, self.infer([value[key] for value in objects], depth + 1)) for key in keys])


def join_types(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return a type for the values of both types, which both came from JSON."""
    if one.equals(other) or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_list(one) and pa.types.is_list(other):
        return pa.list_(join_types(one.value_type, other.value_type))
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        if {field.name for field in one} != {field.name for field in other}:
            return JSON
        return pa.struct([(field.name, join_types(field.type, other.field(field.name).type)) for field in one])
    # Where a value doesn't fit, `convert_array` fails, and the column becomes JSON text.
    for wide in (pa.float64(), pa.uint64()):
        if {one, other} == {pa.int64(), wide}:
            return wide
    return JSON


def makes_decimals(before: pa.DataType, after: pa.DataType) -> bool:
    """Return True if whole numbers of a type become decimals in another one, here or deeper."""
    if pa.types.is_integer(before):
        return bool(pa.types.is_floating(after))
    if pa.types.is_struct(before) and pa.types.is_struct(after):
        return any(makes_decimals(field.type, after.field(field.name).type) for field in before)
    item_type, new_item_type = get_item_type(before), get_item_type(after)
    return item_type is not None and new_item_type is not None and makes_decimals(item_type, new_item_type)


def fits_json(type: pa.DataType) -> bool:
    """Return True if JSON text holds each value of a type, and gives it back as Python has it."""
    if pa.types.is_struct(type):
        return all(fits_json(field.type) for field in type)
    item_type = get_item_type(type)
    if item_type is not None:
        return fits_json(item_type)
    is_kind = pa.types
    kinds = (is_kind.is_null, is_kind.is_boolean, is_kind.is_integer, is_kind.is_string, is_kind.is_large_string)
    is_float = pa.types.is_float32(type) or pa.types.is_float64(type)
    return is_float or isinstance(type, pa.JsonType) or any(is_type(type) for is_type in kinds)


def build_array(values: Sequence[Any], target: pa.DataType) -> pa.Array:
    """Return values as an array of a type of `TypeInference`.

    Raises:
        pyarrow.ArrowInvalid, OverflowError: a value doesn't fit.
    """
    return _build_array(values, target, replace_leaf_types(target, get_storage_type))


def build_typed_array(values: Sequence[Any], target: pa.DataType, encoding: int) -> pa.Array:
    """Return values of JSON lines, as `json.loads` returns them, as an array of a dataset card's type.

    Args:
        encoding: 1 where values of mixed types are JSON text, as older runs wrote them.

    Raises:
        pyarrow.ArrowException, ValueError, TypeError, OverflowError: a value is none of the type.
    """
    encode = _keep_text if encoding == 1 else _encode
    return _build_array(values, target, replace_leaf_types(target, _get_json_type), encode)


def to_python(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return an array's values, those that are stored as JSON text decoded; see `decode_json`."""
    decode = _make_walk(array.type, decode_json)
    values = to_python_values(array)
    return values if decode is None else list(map(decode, values))


def decode_json(text: str) -> Any:
    """Return the value of JSON text; a text that is none, which other writers may leave, is its own value."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def holds_other_text(array: pa.ChunkedArray) -> bool:
    """Return True if a text of an array that should be JSON is none, here or deeper."""
    check = _make_walk(array.type, json.loads)
    if check is None:
        return False
    try:
        for value in to_python_values(array):
            check(value)
    except (ValueError, RecursionError):
        return True
    return False


def convert_array(array: pa.Array | pa.ChunkedArray, target: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """Return an array's values, unchanged, as another type.

    Raises:
        pyarrow.ArrowInvalid, OverflowError: a value doesn't fit.
    """
    if array.type.equals(target):
        return array
    if not (holds_json(target) or holds_json(array.type)):
        with contextlib.suppress(pa.ArrowNotImplementedError):  # Arrow has no cast between some nested types
            return array.cast(target)
    return build_array(to_python(array), target)


def holds_json(target: pa.DataType) -> bool:
    """Return True if values of a type are stored as JSON text, here or deeper."""
    return _make_walk(target, decode_json) is not None


def _make_walk(target: pa.DataType, convert: Convert) -> Convert | None:
    """Return a function that converts the JSON parts of a value; None if the type has no such part."""
    if isinstance(target, pa.JsonType):
        return lambda value: None if value is None else convert(value)
    if pa.types.is_struct(target):
        walks = {field.name: walk for field in target if (walk := _make_walk(field.type, convert)) is not None}
        if walks:
            return lambda value: (
                value and {key: walks[key](item) if key in walks else item for key, item in value.items()}
            )
    elif pa.types.is_list(target) or pa.types.is_large_list(target) or pa.types.is_fixed_size_list(target):
        walk = _make_walk(target.value_type, convert)
        if walk is not None:
            return lambda value: value and list(map(walk, value))
    return None


def _keep_text(value: Any) -> str:
    return value if isinstance(value, str) else _encode(value)


def _build_array(
    values: Sequence[Any], target: pa.DataType, plain: pa.DataType, encode_json: Convert = _encode
) -> pa.Array:
    """Return values as an array of a type, by way of a type that Arrow makes of Python's values."""
    encode = _make_walk(target, encode_json)
    array = pa.array(values if encode is None else list(map(encode, values)), plain)
    if plain.equals(target):
        return array
    chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    return pa.chunked_array([give_type(chunk, target) for chunk in chunks], target)


def get_storage_type(leaf: pa.DataType) -> pa.DataType:
    """Return the type in which Arrow holds values of an extension type; any other type as it is."""
    return leaf.storage_type if isinstance(leaf, pa.BaseExtensionType) else leaf


def _get_json_type(leaf: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(leaf) or pa.types.is_decimal(leaf):
        return pa.string()
    return get_storage_type(leaf)


def give_type(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Return an array of the storage types of a type, or of texts for times and decimals, as one of that type."""
    if array.type.equals(target):
        return array
    if isinstance(target, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(target, array)
    if pa.types.is_struct(target):
        children = [give_type(child, field.type) for child, field in zip(array.flatten(), target, strict=True)]
        return pa.StructArray.from_arrays(children, fields=list(target), mask=array.is_null())
    if (item_type := get_item_type(target)) is None:
        return _parse_texts(array, target)
    if pa.types.is_fixed_size_list(target):
        items = np.arange(len(array.values))
        is_hidden = np.repeat(array.is_null().to_numpy(zero_copy_only=False), target.list_size)  # by a null
        values = give_type(array.values.take(pa.array(items, mask=is_hidden)), item_type)
        return pa.FixedSizeListArray.from_arrays(values, type=target, mask=array.is_null())
    values = give_type(array.values, item_type)
    kind = pa.LargeListArray if pa.types.is_large_list(target) else pa.ListArray
    return kind.from_arrays(array.offsets, values, type=target, mask=array.is_null())


def _parse_texts(array: pa.Array, target: pa.DataType) -> pa.Array:
    try:
        return array.cast(target)
    except pa.ArrowInvalid:
        if not pa.types.is_timestamp(target) or target.unit == "ns":
            raise
    # Arrow reads no offset with seconds, as zones have before the year 1900.
    return pa.array([None if text is None else datetime.fromisoformat(text) for text in array.to_pylist()], target)
