"""Turn Arrow tables into JSON lines: which values JSON can hold, and how.

- Null, booleans, numbers, texts, lists and structs are JSON's own.
- A column of mixed types, which Arrow holds as JSON text (`Json` of `datasets`), is written as the values themselves.
  A text among them that is no JSON is written as a text, and half of a surrogate pair as its escape.
- Dates, times, timestamps and decimals become text, as `str` writes them, which is also what a template inserts. The
  dataset card names their types. `dpgen export` and the Python API read all values back; `datasets.load_dataset` takes
  texts that look like dates for dates, whatever the card says, and cuts decimals off beside values of mixed types.
- JSON can't hold bytes, durations, maps, NaN and infinities. `dpgen.output.format_check` rejects them at the start.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dpgen.data.reading.invalid_text import escape
from dpgen.data.reading.json_types import decode_json
from dpgen.data.reading.python_values import get_item_type, replace_leaf_types, to_python_values

if TYPE_CHECKING:
    import pyarrow as pa

# How JSON lines are written, as `_SUCCESS` names it. Version 1, unnamed, wrote JSON text for values of mixed types, and
# null for NaN and infinities. `verify` still accepts it.
JSONL_ENCODING = 2

Converter = Callable[[Any], Any]


def to_json_columns(table: pa.Table, encoding: int = JSONL_ENCODING) -> dict[str, list[Any]]:
    """Return a table's columns as lists of values for `format_json_line`, by name.

    Args:
        encoding: 1 for the values that older runs wrote.
    """
    return {name: _to_json_values(table.column(i), encoding) for i, name in enumerate(table.column_names)}


def iter_json_lines(table: pa.Table) -> Iterator[str]:
    """Yield one line for each row of a table."""
    columns = to_json_columns(table)
    for values in zip(*columns.values(), strict=True):
        yield format_json_line(dict(zip(columns, values, strict=True)))


def format_json_line(row: dict[str, Any]) -> str:
    """Return a row as one line of strict JSON, in UTF-8 characters rather than escapes.

    Raises:
        ValueError: a NaN or an infinity, which `dpgen.output.format_check` should have found.
    """
    return json.dumps(row, ensure_ascii=False, default=str, allow_nan=False) + "\n"


def build_card_schema(schema: pa.Schema) -> pa.Schema:
    """Return the types that `datasets` can read a schema's columns with, out of JSON lines.

    Arrow casts text to a timestamp only with as many digits as the unit has, and to a time of day not at all. It reads
    numbers beyond 63 bits as floats.
    """
    import pyarrow as pa

    return pa.schema([field.with_type(replace_leaf_types(field.type, _to_card_type)) for field in schema])


def _to_json_values(column: pa.ChunkedArray, encoding: int) -> list[Any]:
    if encoding == 1:
        return [_to_encoding_1(value) for value in column.to_pylist()]
    convert = _make_converter(column.type)
    values = to_python_values(column)
    return values if convert is None else list(map(convert, values))


def _make_converter(type: pa.DataType) -> Converter | None:
    """Return what turns a value of `to_pylist` into a JSON value; None if nothing has to change."""
    import pyarrow as pa

    if isinstance(type, pa.JsonType):
        return _accept_null(_decode_json)
    item_type = get_item_type(type)
    if item_type is not None:
        convert_item = _make_converter(item_type)
        return None if convert_item is None else _accept_null(lambda items: list(map(convert_item, items)))
    if not pa.types.is_struct(type):
        return None
    converters = {field.name: convert for field in type if (convert := _make_converter(field.type)) is not None}
    if not converters:
        return None
    return _accept_null(lambda value: value | {key: convert(value[key]) for key, convert in converters.items()})


def _decode_json(text: str) -> Any:
    value = decode_json(text)
    return escape(value) if "\\u" in text else value


def _accept_null(convert: Converter) -> Converter:
    return lambda value: None if value is None else convert(value)


def _to_card_type(type: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if pa.types.is_time(type):
        return pa.string()
    if type == pa.uint64():
        return pa.json_()  # which `datasets` decodes as Python does
    is_ms = pa.types.is_timestamp(type) and type.unit == "ms"
    return pa.timestamp("us", type.tz) if is_ms else type  # `str` writes microseconds


def _to_encoding_1(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _to_encoding_1(item) for key, item in value.items()}
    return [_to_encoding_1(item) for item in value] if isinstance(value, list) else value
