"""Write the rows of an export as Parquet, JSON lines, CSV, or a folder of `save_to_disk`.

- Parquet has the row groups and shards that `datasets` pushes to the Hub: 100 MB and 500 MB as Arrow holds them, with
  a page index for the Hub's viewer, and pages cut by content, so that the Hub stores equal rows of two exports once.
- JSON lines and CSV hold a value as `dpgen.output.json_lines` does. In CSV a list or a struct is JSON text, a null is
  an empty field, and an empty text is ``""``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dpgen.data.saved_dataset import save_to_disk
from dpgen.errors import ConfigError
from dpgen.output.column_values import shorten_decimals
from dpgen.output.conversations import get_messages_type
from dpgen.output.dataset_writer import choose_encodings
from dpgen.output.file_set import number_files
from dpgen.output.format_check import find_columns_without_parquet, find_reason, find_types_without_json
from dpgen.output.json_lines import format_json_line, to_json_columns

if TYPE_CHECKING:
    import pyarrow as pa

# The suffix of a file → its format. Any other name is a folder of Parquet files.
SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
# Endings of compressed files, as pyarrow names their codecs.
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
# Suffixes of files that no export writes, and nobody gives to a folder.
OTHER_SUFFIXES = frozenset((".json", ".tsv", ".txt", ".arrow", ".feather", ".xls", ".xlsx", ".xz", ".lz4", ".zip"))
FORMATS = ("parquet", "jsonl", "csv", "save_to_disk", "messages")
# The files of a folder, which may be replaced; README.md is the card, which pushes to the Hub have.
FOLDER_FILES = {
    "parquet": ("README.md", "train-*-of-*.parquet"),
    "save_to_disk": ("data-*-of-*.arrow", "dataset_info.json", "state.json"),
}

_ROW_GROUP_BYTES = 100 << 20
_SHARD_BYTES = 500 << 20
_BUFFER_BYTES = 1 << 20
_CHUNKING = {"min_chunk_size": 256 << 10, "max_chunk_size": 1 << 20, "norm_level": 0}


class TableWriter(Protocol):
    """Interface of what writes the rows of an export."""

    def write(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


@contextmanager
def open_writer(format: str, path: Path, schema: pa.Schema, float_columns: Sequence[str]) -> Iterator[TableWriter]:
    """Open what writes tables of a schema.

    Args:
        format: one of `FORMATS`; "messages" is written as JSON lines.
        path: the file, or for `save_to_disk` the folder, which must exist, as for Parquet files without a suffix.
        float_columns: columns of log-probabilities.

    Raises:
        ConfigError: the format can't hold a column's type or, once rows are written, one of its values.
    """
    writer: TableWriter
    with ExitStack() as stack:
        _check_types(format, schema)
        if format == "parquet":
            writer = _ParquetWriter(path, schema, float_columns)
        elif format == "save_to_disk":
            writer = _SavedDatasetWriter(path, schema)
        else:
            stream = stack.enter_context(_open_stream(path))
            kinds: dict[str, type[_CsvWriter | _JsonLinesWriter]] = {
                "csv": _CsvWriter,
                "jsonl": _JsonLinesWriter,
                "messages": _MessagesWriter,
            }
            writer = kinds[format](stream, schema, float_columns)
        yield writer
        writer.close()


class _ParquetWriter:
    """Write one Parquet file, or a folder of them."""

    def __init__(self, path: Path, schema: pa.Schema, float_columns: Sequence[str]) -> None:
        self._path, self._schema, self._is_folder = path, schema, path.is_dir()
        self._encodings = choose_encodings(schema, float_columns)
        self._pending: list[pa.Table] = []
        self._num_pending_bytes = self._num_shard_bytes = 0
        self._shards: list[Path] = []
        self._file: Any = None
        self._open_next()  # even if no row follows: an empty export is one file without rows

    def write(self, table: pa.Table) -> None:
        if self._pending and self._num_pending_bytes + table.nbytes > _ROW_GROUP_BYTES:
            self._write_row_group()
        self._pending.append(table)
        self._num_pending_bytes += table.nbytes

    def close(self) -> None:
        self._write_row_group()
        self._file.close()
        if self._is_folder:
            number_files(self._shards)

    def _write_row_group(self) -> None:
        import pyarrow as pa

        if not self._pending:
            return
        if self._is_folder and self._num_shard_bytes and self._num_shard_bytes + self._num_pending_bytes > _SHARD_BYTES:
            self._file.close()
            self._open_next()
        group = pa.concat_tables(self._pending)
        self._file.write_table(group, row_group_size=max(1, group.num_rows))
        self._num_shard_bytes += self._num_pending_bytes
        self._pending, self._num_pending_bytes = [], 0

    def _open_next(self) -> None:
        import pyarrow.parquet as pq

        self._num_shard_bytes = 0
        path = self._path / f"part-{len(self._shards):05d}.parquet" if self._is_folder else self._path
        self._shards.append(path)
        options = {"write_page_index": True, "use_content_defined_chunking": _CHUNKING, **self._encodings}
        self._file = pq.ParquetWriter(path, self._schema, compression="zstd", **options)


class _SavedDatasetWriter:
    """Write an Arrow stream beside the folder, from which `datasets` then makes the folder."""

    def __init__(self, directory: Path, schema: pa.Schema) -> None:
        import pyarrow as pa

        self._directory = directory
        self._rows_file = directory.with_name(f"{directory.name}.rows")
        self._stream = pa.ipc.new_stream(str(self._rows_file), schema)

    def write(self, table: pa.Table) -> None:
        self._stream.write_table(table)

    def close(self) -> None:
        self._stream.close()
        try:
            save_to_disk(self._rows_file, self._directory, _SHARD_BYTES)
        finally:
            self._rows_file.unlink()


class _JsonLinesWriter:
    """Write one JSON object a row."""

    def __init__(self, stream: Any, schema: pa.Schema, float_columns: Sequence[str]) -> None:
        self._stream, self._float_columns = stream, float_columns

    def write(self, table: pa.Table) -> None:
        columns = self._convert(shorten_decimals(table, self._float_columns))
        with _explain_values(table):
            for values in zip(*columns.values(), strict=True):
                line = format_json_line(dict(zip(columns, values, strict=True)))
                self._stream.write(line.encode("utf-8"))

    def close(self) -> None:
        pass

    def _convert(self, table: pa.Table) -> dict[str, list[Any]]:
        return to_json_columns(table)


class _MessagesWriter(_JsonLinesWriter):
    """Write JSON lines whose messages have no keys that say nothing: trainers take ``"tool_calls": null`` for calls."""

    def _convert(self, table: pa.Table) -> dict[str, list[Any]]:
        columns = super()._convert(table)
        for item in table.schema:
            if item.type in (get_messages_type(), get_messages_type(has_parts=True)):
                columns[item.name] = [list(map(_drop_nulls, messages)) for messages in columns[item.name]]
        return columns


def _drop_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without its null keys, nor those of its parts; its content stays, which is null beside calls."""
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    if isinstance(kept["content"], list):
        kept["content"] = [{key: value for key, value in part.items() if value is not None} for part in kept["content"]]
    return kept


class _CsvWriter:
    """Write CSV: numbers and booleans as they are, all else as texts in quotes."""

    def __init__(self, stream: Any, schema: pa.Schema, float_columns: Sequence[str]) -> None:
        import pyarrow as pa
        import pyarrow.csv

        self._float_columns = float_columns
        self._schema = pa.schema(
            [field if _is_number(field.type) else field.with_type(pa.string()) for field in schema]
        ).remove_metadata()
        self._writer = pyarrow.csv.CSVWriter(stream, self._schema)

    def write(self, table: pa.Table) -> None:
        import pyarrow as pa

        table = shorten_decimals(table, self._float_columns)
        texts = [field.name for field in self._schema if not _is_number(table.schema.field(field.name).type)]
        columns = to_json_columns(table.select(texts))
        with _explain_values(table):
            arrays = [
                pa.array(map(_to_csv_text, columns[name]), pa.string()) if name in columns else table[name]
                for name in table.column_names
            ]
        self._writer.write_table(pa.table(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _to_csv_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    is_nested = isinstance(value, (list, dict, bool, int, float))
    return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False) if is_nested else str(value)


def _is_number(type: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_boolean(type))


@contextmanager
def _open_stream(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    codec = COMPRESSIONS.get(path.suffix.lower())
    with pa.output_stream(str(path), compression=codec, buffer_size=_BUFFER_BYTES) as stream:
        yield stream


def _check_types(format: str, schema: pa.Schema) -> None:
    """Check that a format can hold the columns' types.

    Raises:
        ConfigError: names each column that it can't.
    """
    if format == "save_to_disk":
        return
    if format == "parquet":
        reasons, name, other = dict(find_columns_without_parquet(schema.empty_table())), "parquet", "jsonl"
    else:
        reasons, name, other = dict(find_types_without_json(schema)), "csv" if format == "csv" else "jsonl", "parquet"
    if reasons:
        others = ",".join(field.name for field in schema if field.name not in reasons)
        remedy = f"Export as {other}, or leave it out: --columns {others}"
        raise ConfigError(
            *(f"--format {name} can't hold the column {column!r}: {why}. {remedy}" for column, why in reasons.items())
        )


@contextmanager
def _explain_values(table: pa.Table) -> Iterator[None]:
    """Turn the error for a value that JSON can't represent into one that names its column.

    Raises:
        ConfigError: there is such a value.
    """
    try:
        yield
    except ValueError:
        for name in table.column_names:
            if why := find_reason(table[name].chunks):
                raise ConfigError(
                    f"the column {name!r} holds {why}, which JSON can't: export as parquet, or leave the column out "
                    "with --columns"
                ) from None
        raise
