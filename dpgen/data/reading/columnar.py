"""Read Parquet and Arrow files, in types that `datasets` and other readers know, a bounded number of bytes at a time.

A column that can't be read, or whose type differs between files, is left out and named: it matters only if it is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pyarrow as pa

from dpgen.data.reading.invalid_text import InvalidValues, repair_column
from dpgen.data.reading.json_types import JSON, get_storage_type, give_type, holds_other_text
from dpgen.data.reading.python_values import replace_leaf_types
from dpgen.data.reading.source import BATCH_BYTES, UnreadableColumns, UnreadableInput, find_disguise

_MAX_ROWS = 1_000
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


class ColumnarReader:
    """Read Parquet or Arrow files one after the other.

    Args:
        kind: "parquet" or "arrow".
        report_place: called with the file and row group before they are read.
        skipped: columns to leave out.

    Attributes:
        invalid: values with text that is not UTF-8, by the row's number over all files.
        notes: none.
    """

    def __init__(self, kind: str, report_place: Callable[[str], None], skipped: frozenset[str] = frozenset()) -> None:
        self._kind, self._report_place, self._skipped = kind, report_place, skipped
        self.invalid: InvalidValues = {}
        self.notes: list[str] = []
        self._changed: dict[str, str] = {}
        self._num_rows = 0

    def iter_tables(self, file: str) -> Iterator[pa.Table]:
        """Yield a file's rows.

        Raises:
            UnreadableInput: the file can't be read; names the file and the row group.
            UnreadableColumns: some columns can't be read.
        """
        batches = self._iter_parquet(file) if self._kind == "parquet" else self._iter_arrow(file)
        for batch in batches:
            table = self._normalize(file, batch)
            self._num_rows += table.num_rows
            yield table

    def describe_changes(self) -> dict[str, str]:
        """Return what changes in which column, where other readers see values of another kind."""
        return self._changed

    def _iter_parquet(self, file: str) -> Iterator[pa.RecordBatch]:
        import pyarrow.parquet as pq

        try:
            # Where its writer has added checksums, they are compared.
            source = pa.OSFile(os.fsencode(file))  # a path as text has to be UTF-8
            parquet = pq.ParquetFile(source, page_checksum_verification=True)
            schema = parquet.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise _make_file_error(file, error) from None
        names = self._select_names(file, schema)
        with source, parquet:
            if not parquet.metadata.num_row_groups:
                yield pa.RecordBatch.from_arrays([pa.array([], schema.field(name).type) for name in names], names)
            for number in range(parquet.metadata.num_row_groups):
                self._report_place(f"{file}, row group {number}")
                group = parquet.metadata.row_group(number)
                bytes_per_row = max(1, group.total_byte_size // max(1, group.num_rows))
                num_rows = max(1, min(_MAX_ROWS, BATCH_BYTES // bytes_per_row))
                try:
                    yield from parquet.iter_batches(num_rows, row_groups=[number], columns=names)
                except (pa.ArrowException, OSError) as error:
                    _raise_for_columns(parquet, file, number, names, error)

    def _iter_arrow(self, file: str) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(os.fsencode(file)) as source:
            try:
                try:
                    reader = pa.ipc.open_stream(source)
                except pa.ArrowInvalid:
                    reader = pa.ipc.open_file(source)
                batches = (
                    iter(reader)
                    if isinstance(reader, pa.RecordBatchStreamReader)
                    else map(reader.get_batch, range(reader.num_record_batches))
                )
                names = self._select_names(file, reader.schema)
                is_empty = True
                for batch in batches:
                    is_empty = False
                    yield batch.select(names)
                if isinstance(reader, pa.RecordBatchStreamReader):
                    _check_end(file)
            except (pa.ArrowException, OSError) as error:
                raise _make_file_error(file, error) from None
            if is_empty:
                yield pa.RecordBatch.from_arrays(
                    [pa.array([], reader.schema.field(name).type) for name in names], names
                )

    def _select_names(self, file: str, schema: pa.Schema) -> list[str]:
        """Return the names of the columns to read.

        Raises:
            UnreadableColumns: several columns have the same name.
        """
        names = [name for name in schema.names if name not in self._skipped]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise UnreadableColumns(dict.fromkeys(repeated, f"{file} has several columns of this name"))
        return names

    def _normalize(self, file: str, batch: pa.RecordBatch) -> pa.Table:
        """Return a table with types that `datasets` knows, and with text that is UTF-8."""
        columns, reasons = [], {}
        for field, array in zip(batch.schema, batch.columns, strict=True):
            try:
                column = to_known_type(pa.chunked_array([array]))
                columns.append(self._validate(field.name, column))
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                reasons[field.name] = f"{file}: {_first_line(error)}"
            if (change := _describe_change(field.type)) is not None:
                self._changed[field.name] = change
            elif field.name not in self._changed and field.name not in reasons and holds_other_text(column):
                self._changed[field.name] = f"texts that are no JSON are read as they stand (first in {file})"
        if reasons:
            raise UnreadableColumns(reasons)
        is_same = all(column.type.equals(field.type) for column, field in zip(columns, batch.schema, strict=True))
        return pa.table(columns, names=batch.schema.names, metadata=batch.schema.metadata if is_same else None)

    def _validate(self, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
        try:
            column.validate(full=True)
            return column
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
        chunk = column.combine_chunks()
        return pa.chunked_array([repair_column(chunk, name, self._num_rows, self.invalid)])


def to_known_type(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column in a type that `datasets` and other readers know: no views, dictionaries or maps.

    Raises:
        TypeError: there is no such type.
    """
    target = _find_known_type(column.type)
    if target.equals(column.type):
        return column
    if isinstance(column.type, pa.BaseExtensionType):
        storage = [chunk.storage for chunk in column.chunks]
        column = pa.chunked_array(storage, column.type.storage_type)
        if isinstance(target, pa.JsonType):
            return pa.chunked_array(
                [pa.ExtensionArray.from_storage(JSON, chunk.cast(pa.string())) for chunk in storage], JSON
            )
        if not pa.types.is_boolean(target):  # of `bool8`, whose storage is a number
            return to_known_type(column)
    plain = replace_leaf_types(target, get_storage_type)
    if not plain.equals(target):  # Arrow has no cast from JSON to JSON of another storage, inside of a type
        chunks = [give_type(chunk, target) for chunk in to_known_type(column.cast(plain)).chunks]
        return pa.chunked_array(chunks, target)
    try:
        converted = column.cast(target)
        converted.validate()  # Arrow 26 gives list views with a null too few offsets
        return converted
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        values = [_to_lists(value, column.type) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(values, target)], target)


def _find_known_type(type: pa.DataType) -> pa.DataType:
    is_type = pa.types
    if is_type.is_string_view(type):
        return pa.string()
    if is_type.is_binary_view(type):
        return pa.binary()
    if is_type.is_dictionary(type) or is_type.is_run_end_encoded(type):
        return _find_known_type(type.value_type)
    if is_type.is_decimal32(type) or is_type.is_decimal64(type):
        return pa.decimal128(type.precision, type.scale)
    if is_type.is_map(type):
        pair = [("key", _find_known_type(type.key_type)), ("value", _find_known_type(type.item_type))]
        return pa.list_(pa.struct(pair))
    if is_type.is_struct(type):
        return pa.struct([field.with_type(_find_known_type(field.type)) for field in type])
    if is_type.is_fixed_size_list(type):
        return pa.list_(type.value_field.with_type(_find_known_type(type.value_type)), type.list_size)
    if is_type.is_large_list(type) or is_type.is_large_list_view(type):
        return pa.large_list(type.value_field.with_type(_find_known_type(type.value_type)))
    if is_type.is_list(type) or is_type.is_list_view(type):
        return pa.list_(type.value_field.with_type(_find_known_type(type.value_type)))
    if isinstance(type, pa.Bool8Type):
        return pa.bool_()
    if isinstance(type, pa.JsonType):  # others than `JSON`, such as one of large strings, become texts in `datasets`
        return JSON
    if isinstance(type, pa.BaseExtensionType):
        return _find_known_type(type.storage_type)
    if is_type.is_union(type) or is_type.is_interval(type):
        raise TypeError(f"the type {type} is not supported: cast the column to another one")
    return type


def _describe_change(type: pa.DataType) -> str | None:
    """Return how the values of a type look after `to_known_type`, where other readers see another kind of value."""
    if pa.types.is_map(type):
        return "a map is read as a list of {key, value}"
    if isinstance(type, pa.BaseExtensionType) and not isinstance(type, pa.JsonType | pa.Bool8Type):
        return f"{type.extension_name} is read as {_find_known_type(type.storage_type)}"
    children = (type.field(index).type for index in range(type.num_fields))
    return next(filter(None, map(_describe_change, children)), None)


def _to_lists(value: object, type: pa.DataType) -> object:
    """Return a value with the pairs of its maps as objects."""
    if value is None:
        return None
    if pa.types.is_map(type):
        return [
            {"key": _to_lists(key, type.key_type), "value": _to_lists(item, type.item_type)}
            for key, item in value  # type: ignore[attr-defined]
        ]
    if pa.types.is_struct(type):
        return {field.name: _to_lists(value[field.name], field.type) for field in type}  # type: ignore[index]
    if isinstance(value, list) and type.num_fields == 1:
        return [_to_lists(item, type.field(0).type) for item in value]
    return value


def _raise_for_columns(parquet: object, file: str, number: int, names: list[str], error: Exception) -> None:
    """Raise an error that names the columns of a row group that can't be read, if others can."""
    reasons = {}
    for name in names:
        try:
            for _ in parquet.iter_batches(_MAX_ROWS, row_groups=[number], columns=[name]):  # type: ignore[attr-defined]
                pass
        except (pa.ArrowException, OSError) as own_error:
            reasons[name] = f"{file}, row group {number}: {_first_line(own_error)}"
    if reasons and len(reasons) < len(names):
        raise UnreadableColumns(reasons)
    raise UnreadableInput(f"{file}, row group {number}: {_first_line(error)}")


def _check_end(file: str) -> None:
    """Check that an Arrow stream has its end: without it, a reader takes what a cut left for all rows.

    Raises:
        UnreadableInput: it has none.
    """
    with open(file, "rb") as stream:
        stream.seek(-len(_STREAM_END), os.SEEK_END)
        if stream.read() != _STREAM_END:
            raise UnreadableInput(
                f"{file} lacks the end of an Arrow stream: it was cut short, or its writer not closed"
            )


def _make_file_error(file: str, error: Exception) -> UnreadableInput:
    return UnreadableInput(f"{file}: {find_disguise(file) or _first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
