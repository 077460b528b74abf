"""From journals to the final dataset: every row once, in input order.

Everything is written beside its final place, synced and renamed; `_SUCCESS` comes last. Memory stays flat: a few
numbers a row, and one batch of rows at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpgen.config.schema import OutputConfig
from dpgen.data.input_rows import InputRows
from dpgen.errors import ConfigError, DpgenError, suggest_name
from dpgen.formatting import format_count
from dpgen.journal.files import atomic_write_text, publish_directory
from dpgen.journal.reader import DamagedRecord, JournalIndex, JournalReader, index_journal
from dpgen.journal.run_dir import RunDir
from dpgen.journal.segment import RowsLost, repair_segment
from dpgen.output.result_stats import ResultStats
from dpgen.records import Completion, RowResult

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 2_000


def check_output_columns(input_columns: list[str], kept_columns: list[str] | None, token_ids: bool) -> None:
    """Refuses columns to keep that the input has not, or that would collide with the result's.

    Raises:
        ConfigError: names the column.
    """
    added = result_columns([], has_samples=False, token_ids=token_ids)
    for name in input_columns if kept_columns is None else kept_columns:
        if name in added:
            others = [each for each in input_columns if each not in added]
            raise ConfigError(
                f"the input's column {name!r} would collide with the result's; keep only others: "
                f"data.columns=[{','.join(others)}]"
            )
    for name in kept_columns or ():
        if name not in input_columns:
            raise ConfigError(
                f"data.columns: there is no column {name!r}{suggest_name(name, input_columns, 'columns')}"
            )


def write_dataset(
    rows: InputRows, folder: RunDir, config: OutputConfig, kept_columns: list[str] | None, has_samples: bool
) -> dict[str, Any]:
    """Writes RUN_DIR/dataset from the journals, then `_SUCCESS`; rank 0 alone does this.

    Args:
        kept: the input columns to keep; None for all.
        has_samples: whether rows have several samples, so that what is a sample's becomes a list.

    Returns:
        what `_SUCCESS` holds (num_rows, num_errors, errors by type, num_generated_tokens, the result's hash), and
        first_error, for a person.

    Raises:
        DpgenError: a row has no result, or the disk refuses.
    """
    index = index_journal(folder.journal)
    _check_complete(index, len(rows))
    try:
        summary = _write_files(rows, index, folder, config, kept_columns, has_samples)
    except DamagedRecord as error:
        raise RowsLost(error.path, repair_segment(error.path)) from None
    except OSError as error:
        raise DpgenError(
            f"{folder.dataset} can't be written: {error.strerror}; the rows are safe in {folder.journal}: make room, "
            "then run the same command again"
        ) from None
    first_error = summary.pop("first_error")
    atomic_write_text(folder.success, json.dumps(summary, indent=2) + "\n")
    return {**summary, "first_error": first_error}


def _check_complete(index: JournalIndex, num_rows: int) -> None:
    missing = np.setdiff1d(np.arange(num_rows), index.row)
    unknown = index.row[(index.row < 0) | (index.row >= num_rows)]
    if len(missing) or len(unknown):
        raise DpgenError(
            f"the journal lacks {len(missing):,} of {format_count(num_rows, 'row')}"
            + (f" (the first is row {missing[0]})" if len(missing) else "")
            + (f" and holds {format_count(len(unknown), 'row')} that the input has not" if len(unknown) else "")
            + "; run the same command again to generate what is missing"
        )


def _write_files(
    rows: InputRows,
    index: JournalIndex,
    folder: RunDir,
    config: OutputConfig,
    kept_columns: list[str] | None,
    has_samples: bool,
) -> dict[str, Any]:
    temporary = folder.path / ".dataset.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # a crash while writing left it; it is made anew from the journal
    temporary.mkdir()
    num_files = max(1, -(-len(rows) // config.rows_per_file))
    tally = ResultStats()
    with ExitStack() as stack:
        schema = rows.build_output_schema(_result_schema(has_samples, config.token_ids), kept_columns)
        if len(rows):
            rows.write_card(temporary, schema)
        out = stack.enter_context(_FileSetWriter(temporary, config, schema, has_samples, num_files))
        reader = stack.enter_context(JournalReader(index))
        for start, table in _iter_input_batches(rows, kept_columns):
            # The index has every row once, sorted: entry i is row i.
            results = [reader.result(row) for row in range(start, start + table.num_rows)]
            for result in results:
                tally.add(result)
            out.write(table, results)
    publish_directory(temporary, folder.dataset)
    return {**tally.to_dict(), "first_error": tally.first_error}


def _iter_input_batches(rows: InputRows, kept_columns: list[str] | None) -> Iterator[tuple[int, pa.Table]]:
    start = 0
    # A table without columns has no rows either: where none is kept, one is read for their number.
    for table in rows.iter_tables(_BATCH_ROWS, rows.columns[:1] if kept_columns == [] else kept_columns):
        yield start, table
        start += table.num_rows


class _FileSetWriter:
    """The files of the final dataset, filled one after the other: ``train-00000-of-00003.parquet``, ..."""

    def __init__(
        self, folder: Path, config: OutputConfig, schema: pa.Schema, has_samples: bool, num_files: int
    ) -> None:
        self._folder, self._config, self._schema = folder, config, schema
        self._has_samples, self._num_files = has_samples, num_files
        self._file_number, self._room = -1, 0
        self._sink: Any = None

    def __enter__(self) -> _FileSetWriter:
        self._open_next()  # also where no row will come: an empty result is a result
        return self

    def __exit__(self, *_: object) -> None:
        self._sink.close()

    def write(self, table: pa.Table, results: list[RowResult]) -> None:
        """Appends rows: the input's kept columns, and their results."""
        import pyarrow as pa

        columns = {name: table[name] for name in table.column_names if name in self._schema.names}
        columns |= result_columns(results, self._has_samples, self._config.token_ids)
        table = pa.table(columns).cast(self._schema)
        while table.num_rows:
            if not self._room:
                self._sink.close()
                self._open_next()
            part = table.slice(0, self._room)
            self._write_part(part)
            self._room -= part.num_rows
            table = table.slice(part.num_rows)

    def _open_next(self) -> None:
        import pyarrow.parquet as pq

        self._file_number += 1
        self._room = self._config.rows_per_file
        stem = f"train-{self._file_number:05d}-of-{self._num_files:05d}"
        path = self._folder / f"{stem}.{self._config.format}"
        if self._config.format == "parquet":
            self._sink = pq.ParquetWriter(path, self._schema, compression="zstd")
        else:
            self._sink = path.open("w", encoding="utf-8")

    def _write_part(self, part: pa.Table) -> None:
        if self._config.format == "parquet":
            self._sink.write_table(part)
        else:
            for row in part.to_pylist():
                self._sink.write(_json_line(row))


def _json_line(row: dict[str, Any]) -> str:
    try:
        text = json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:  # a NaN or an infinity, which is rare: others are spared the walk
        text = json.dumps(replace_nan_with_null(row), ensure_ascii=False, default=str)
    return text + "\n"


def replace_nan_with_null(value: Any) -> Any:
    """A value with null for every NaN and infinity, which JSON has no words for.

    As `to_json` of `datasets` and pandas do it. Python's own "NaN" is no JSON: jq, JavaScript and Arrow refuse it.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: replace_nan_with_null(item) for key, item in value.items()}
    return [replace_nan_with_null(item) for item in value] if isinstance(value, list) else value


def _result_schema(has_samples: bool, token_ids: bool) -> pa.Schema:
    import pyarrow as pa

    columns = result_columns([], has_samples, token_ids)
    return pa.schema([(name, values.type) for name, values in columns.items()])


def result_columns(results: list[RowResult], has_samples: bool, token_ids: bool) -> dict[str, pa.Array]:
    """The result's columns as Arrow arrays; with samples, a list a row in those that are a sample's."""
    import pyarrow as pa

    def of_samples(get: Callable[[Completion], Any], type: pa.DataType) -> pa.Array:
        found = [[get(each) for each in result.completions] or None for result in results]
        if has_samples:
            return pa.array(found, pa.list_(type))
        return pa.array([each and each[0] for each in found], type)

    error = pa.struct([("type", pa.string()), ("message", pa.string())])
    columns = {
        "row_id": pa.array([result.row for result in results], pa.int64()),
        "generated_text": of_samples(lambda each: escape_surrogates(each.text), pa.string()),
        "finish_reason": of_samples(lambda each: each.finish_reason, pa.string()),
        "num_prompt_tokens": pa.array([result.num_prompt_tokens for result in results], pa.int64()),
        "num_generated_tokens": of_samples(lambda each: each.num_tokens, pa.int64()),
        "error": pa.array([_to_error_struct(result) for result in results], error),
    }
    if token_ids:
        columns["generated_token_ids"] = of_samples(lambda each: each.token_ids, pa.list_(pa.int64()))
    return columns


def _to_error_struct(result: RowResult) -> dict[str, str] | None:
    if result.error is None:
        return None
    return {"type": result.error.type, "message": escape_surrogates(result.error.message)}


def escape_surrogates(text: str) -> str:
    """The text with lone surrogates, which UTF-8 and so every file format refuses, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
