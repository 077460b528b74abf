"""Check that the result's file format can hold every kept value of the input, before a model loads.

- Parquet can't hold structs without fields, nor some rare types.
- JSON lines can't hold bytes, durations and maps, nor NaN and infinities; see `dpgen.output.json_lines`.
- Types are checked for every column; values are read only of columns that may hold such a value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dpgen.config.yaml.yaml_slips import write_names
from dpgen.data.input_rows import InputRows
from dpgen.data.reading.python_values import get_item_type
from dpgen.errors import ConfigError
from dpgen.journal.reader import BATCH_ROWS

if TYPE_CHECKING:
    import pyarrow as pa

# JSON texts without a match hold finite numbers only.
_MAYBE_NON_FINITE = r"NaN|Inf|[0-9][eE]\+?[0-9]{3}|[0-9]{300}"
_NON_FINITE = "NaN or an infinity"
_LARGE_INTEGER = "an integer above 2^63 - 1"
_OUT_OF_RANGE = "a date before the year 1 or after 9999"


def check_output_format(rows: InputRows, kept_columns: Sequence[str] | None, file_format: str) -> list[str]:
    """Check that files of `output.format` can hold the input's kept columns. Reads the values of some columns.

    Args:
        kept_columns: `data.columns`; None for all.

    Returns:
        one sentence for each column that some programs read wrongly.

    Raises:
        ConfigError: names each column that can't be held, and what it holds.
    """
    import pyarrow as pa

    if file_format == "openai_batch":  # which holds none of them
        return []
    schema = rows.build_output_schema(pa.schema([]), kept_columns)
    large_integers: list[str] = []
    if file_format == "parquet":
        reasons = dict(find_columns_without_parquet(next(rows.iter_tables(1, schema.names)))) if schema.names else {}
        other_format = "jsonl"
    else:
        reasons = dict(find_types_without_json(schema))
        scanned = [field.name for field in schema if field.name not in reasons and _needs_scan(field.type)]
        found = _find_values_without_json(rows, scanned)
        large_integers = [name for name, why in found.items() if _LARGE_INTEGER in why]
        reasons |= {name: why for name, why in found.items() if name not in large_integers}
        other_format = "parquet"
    if not reasons:
        return [
            f"output.format=jsonl: column {name!r}: {found[name]}, which jq and pandas read as a float. "
            "output.format=parquet avoids it"
            for name in large_integers
        ]
    others = [field.name for field in schema if field.name not in reasons]
    remedy = f"Set output.format={other_format}, or keep only other columns: {write_names('data.columns', others)}"
    mistakes = [f"output.format={file_format} can't hold the column {name!r}: {why}" for name, why in reasons.items()]
    raise ConfigError(*(f"{mistake}. {remedy}" for mistake in mistakes))


def find_columns_without_parquet(table: pa.Table) -> Iterator[tuple[str, str]]:
    """Yield (column, reason) for each column that a Parquet file can't hold, as writing it shows."""
    import pyarrow as pa

    if _find_write_error(table) is None:
        return
    for name in table.column_names:
        reason = _find_write_error(pa.table({name: table[name]}))
        if reason is not None:
            yield name, reason


def _find_write_error(table: pa.Table) -> str | None:
    """Return why a Parquet file can't hold a table; None if it can."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(table, pa.BufferOutputStream())
    except (pa.ArrowException, NotImplementedError, ValueError, OSError) as error:
        return str(error).strip().partition(". ")[0].rstrip(".")
    return None


def find_types_without_json(schema: pa.Schema) -> Iterator[tuple[str, str]]:
    """Yield (column, reason) for each column whose type JSON can't represent."""
    for field in schema:
        for path, type in _iter_leaf_types(field.name, field.type):
            what = _describe_if_not_json(type)
            if what is not None:
                yield field.name, f"it holds {what}" + (f" ({path})" if path != field.name else "")
                break


def _describe_if_not_json(type: pa.DataType) -> str | None:
    import pyarrow as pa

    types = pa.types
    is_binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    if any(is_kind(type) for is_kind in is_binary):
        return "bytes"
    if types.is_duration(type) or types.is_interval(type):
        return "durations"
    if types.is_map(type):
        return "maps"
    return "unions" if types.is_union(type) else None


def _iter_leaf_types(path: str, type: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """Yield every type inside a type that is no list and no struct, with the path to it."""
    import pyarrow as pa

    item_type = get_item_type(type)
    if item_type is not None:
        yield from _iter_leaf_types(path, item_type)
    elif pa.types.is_struct(type):
        for field in type:
            yield from _iter_leaf_types(f"{path}.{field.name}", field.type)
    elif isinstance(type, pa.BaseExtensionType) and not isinstance(type, pa.JsonType):
        yield from _iter_leaf_types(path, type.storage_type)
    else:
        yield path, type


def _needs_scan(type: pa.DataType) -> bool:
    return any(_may_not_be_json(leaf) for _, leaf in _iter_leaf_types("", type))


def _may_not_be_json(type: pa.DataType) -> bool:
    """Return True if JSON can represent some values of a type, but not all."""
    import pyarrow as pa

    is_date = pa.types.is_timestamp(type) or pa.types.is_date(type)
    return pa.types.is_floating(type) or is_date or isinstance(type, pa.JsonType) or type == pa.uint64()


def _find_values_without_json(rows: InputRows, columns: Sequence[str]) -> dict[str, str]:
    """Return column → reason for the columns that hold a value that JSON can't represent."""
    reasons: dict[str, str] = {}
    start = 0
    for table in rows.iter_tables(BATCH_ROWS, columns) if columns else ():
        for name in columns:
            if name not in reasons and find_reason(table[name].chunks) is not None:
                reasons[name] = _locate(table[name], start)
        start += table.num_rows
    return reasons


def _locate(column: pa.ChunkedArray, start: int) -> str:
    """Return which row is the first with a value that JSON can't represent, and what that is."""
    low, high = 0, len(column)  # the first such row is in low..high-1
    while high - low > 1:
        middle = (low + high) // 2
        if find_reason(column.slice(low, middle - low).chunks) is not None:
            high = middle
        else:
            low = middle
    return f"it holds {find_reason(column.slice(low, 1).chunks)} (row {start + low})"


def find_reason(arrays: Iterable[pa.Array]) -> str | None:
    """Return what the arrays hold that JSON can't represent; None if there is nothing."""
    for array in arrays:
        for leaf in _iter_leaves(array):
            reason = _find_reason_in_leaf(leaf)
            if reason is not None:
                return reason
    return None


def _iter_leaves(array: pa.Array) -> Iterator[pa.Array]:
    """Yield the arrays of values inside an array of lists and structs, without those that a null hides."""
    import pyarrow as pa

    if get_item_type(array.type) is not None:
        yield from _iter_leaves(array.flatten())
    elif pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from _iter_leaves(child)
    elif isinstance(array.type, pa.BaseExtensionType) and not isinstance(array.type, pa.JsonType):
        yield from _iter_leaves(array.storage)
    elif _may_not_be_json(array.type):
        yield array


def _find_reason_in_leaf(leaf: pa.Array) -> str | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_floating(leaf.type):
        is_finite = pc.is_finite(leaf.cast(pa.float32()) if pa.types.is_float16(leaf.type) else leaf)
        return None if pc.all(is_finite).as_py() in (True, None) else _NON_FINITE
    if leaf.type == pa.uint64():
        return _LARGE_INTEGER if (pc.max(leaf).as_py() or 0) >= 1 << 63 else None
    if not isinstance(leaf.type, pa.JsonType):
        try:
            pc.min_max(leaf).as_py()
        except (ValueError, OverflowError):
            return _OUT_OF_RANGE
        return None
    texts = leaf.storage.filter(pc.fill_null(pc.match_substring_regex(leaf.storage, _MAYBE_NON_FINITE), False))
    return _NON_FINITE if any(map(_holds_non_finite, texts.to_pylist())) else None


def _holds_non_finite(text: str) -> bool:
    """Return True if the value of JSON text holds NaN or an infinity; a text that is no JSON holds none."""
    found: list[str] = []

    def parse_float(number: str) -> float:
        if not math.isfinite(float(number)):
            found.append(number)
        return 0.0

    try:
        json.loads(text, parse_constant=found.append, parse_float=parse_float)
    except (ValueError, RecursionError):
        return False
    return bool(found)
