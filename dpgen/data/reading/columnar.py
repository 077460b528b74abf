"""Read Parquet and Arrow files, in types that `datasets` and other readers know, a bounded number of bytes at a time.

A column that can't be read, or whose type differs between files, is left out and named: it matters only if it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa

from dpgen.data.reading.invalid_text import InvalidValues, repair_column
from dpgen.data.reading.source import BATCH_BYTES, UnreadableColumns, UnreadableInput

_MAX_ROWS = 1_000


class ColumnarReader:
    """Read Parquet or Arrow files one after the other.

    Args:
        kind: "parquet" or "arrow".
        report_place: called with the file and row group before they are read.
        skipped: columns to leave out.

    Attributes:
        invalid: values with text that is not UTF-8, by the row's number over all files.
    """

    def __init__(self, kind: str, report_place: Callable[[str], None], skipped: frozenset[str] = frozenset()) -> None:
        self._kind, self._report_place, self._skipped = kind, report_place, skipped
        self.invalid: InvalidValues = {}
        self._num_rows = 0

    def iter_tables(self, file: str) -> Iterator[pa.Table]:
        """Yield a file's rows.

        Raises:
            UnreadableInput: the file can't be read; names the file and the row group.
            UnreadableColumns: some columns can't be read.
        """
        tables = self._iter_parquet(file) if self._kind == "parquet" else self._iter_arrow(file)
        for table in tables:
            table = self._normalize(file, table)
            self._num_rows += table.num_rows
            yield table

    def _iter_parquet(self, file: str) -> Iterator[pa.Table]:
        import pyarrow.parquet as pq

        try:
            parquet = pq.ParquetFile(file)
            names = [name for name in parquet.schema_arrow.names if name not in self._skipped]
        except (pa.ArrowException, OSError) as error:
            raise _make_file_error(file, error) from None
        with parquet:
            if not parquet.metadata.num_row_groups:
                yield parquet.schema_arrow.empty_table().select(names)
            for number in range(parquet.metadata.num_row_groups):
                self._report_place(f"{file}, row group {number}")
                group = parquet.metadata.row_group(number)
                bytes_per_row = max(1, group.total_byte_size // max(1, group.num_rows))
                num_rows = max(1, min(_MAX_ROWS, BATCH_BYTES // bytes_per_row))
                try:
                    for batch in parquet.iter_batches(num_rows, row_groups=[number], columns=names):
                        yield pa.Table.from_batches([batch])
                except (pa.ArrowException, OSError) as error:
                    _raise_for_columns(parquet, file, number, names, error)

    def _iter_arrow(self, file: str) -> Iterator[pa.Table]:
        with pa.memory_map(file) as source:
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
                names = [name for name in reader.schema.names if name not in self._skipped]
                yield reader.schema.empty_table().select(names)
                for batch in batches:
                    yield pa.Table.from_batches([batch]).select(names)
            except (pa.ArrowException, OSError) as error:
                raise _make_file_error(file, error) from None

    def _normalize(self, file: str, table: pa.Table) -> pa.Table:
        """Return a table with types that `datasets` knows, and with text that is UTF-8."""
        columns, reasons = [], {}
        for field in table.schema:
            try:
                column = to_known_type(table[field.name])
                columns.append(self._validate(field.name, column))
            except (pa.ArrowException, TypeError, ValueError, UnicodeDecodeError) as error:
                reasons[field.name] = f"{file}: {_first_line(error)}"
        if reasons:
            raise UnreadableColumns(reasons)
        is_same = all(column.type.equals(field.type) for column, field in zip(columns, table.schema, strict=True))
        return pa.table(columns, names=table.column_names, metadata=table.schema.metadata if is_same else None)

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
    if isinstance(type, pa.BaseExtensionType) and not isinstance(type, pa.JsonType):
        return _find_known_type(type.storage_type)
    if is_type.is_union(type) or is_type.is_interval(type):
        raise TypeError(f"the type {type} is not supported: cast the column to another one")
    return type


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


def _make_file_error(file: str, error: Exception) -> UnreadableInput:
    with open(file, "rb") as stream:
        is_pointer = stream.read(20).startswith(b"version https://git-")
    if is_pointer:
        return UnreadableInput(f"{file} is a pointer of Git LFS, not the data: run `git lfs pull`")
    return UnreadableInput(f"{file}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
