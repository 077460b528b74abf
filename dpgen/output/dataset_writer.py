"""Write the final dataset from the journals: every row once, in input order.

- Files are written to a temporary directory, synced, then published by a rename. `_SUCCESS` is written last.
- Memory stays flat: 25 bytes per row for the index, and one batch of rows, bounded by rows and by bytes of results.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpgen.config.yaml.yaml_slips import write_names
from dpgen.data.input_rows import InputRows
from dpgen.data.saved_dataset import write_card
from dpgen.errors import ConfigError, DpgenError, suggest_name
from dpgen.formatting import format_count
from dpgen.journal.files import atomic_write_text, publish_directory
from dpgen.journal.reader import DamagedRecord, JournalIndex, JournalReader, index_journal
from dpgen.journal.run_dir import RunDir
from dpgen.journal.segment import RowsLost, repair_segment
from dpgen.output.columns import DatasetFormat, list_float_columns
from dpgen.output.dataset_tables import DatasetTables, ResultReader
from dpgen.output.file_set import FileSet
from dpgen.output.json_lines import JSONL_ENCODING, build_card_schema, iter_json_lines
from dpgen.output.openai_batch.response_files import OPENAI_BATCH, write_response_files
from dpgen.output.result_stats import ResultStats

if TYPE_CHECKING:
    import pyarrow as pa


def check_output_columns(input_columns: list[str], dataset_format: DatasetFormat) -> None:
    """Check the input columns that the dataset will keep.

    Raises:
        ConfigError: the input lacks a column, or a column has the name of a result column.
    """
    added = {column.name for column in dataset_format.result_columns}
    for name in dataset_format.select_kept_columns(input_columns):
        if name in added:
            others = [column for column in input_columns if column not in added]
            raise ConfigError(
                f"data.columns: the input's column {name!r} has the name of a result column. Keep only others: "
                f"{write_names('data.columns', others)}"
            )
    for name in dataset_format.kept_columns or ():
        if name not in input_columns:
            raise ConfigError(
                f"data.columns: there is no column {name!r}{suggest_name(name, input_columns, 'columns')}"
            )


def write_dataset(
    rows: InputRows, run_dir: RunDir, dataset_format: DatasetFormat, rows_per_file: int
) -> dict[str, Any]:
    """Write RUN_DIR/dataset from the journals, then `_SUCCESS`. Only rank 0 calls this.

    Args:
        rows_per_file: the maximum number of rows in one file.

    Returns:
        the content of `_SUCCESS` (see `ResultStats.to_dict`), and first_error and most_frequent_error, for a person.

    Raises:
        DpgenError: a row has no result, the input has changed, or a file can't be written.
        RowsLost: a journal segment is damaged.
    """
    if rows.source.has_changed():
        raise DpgenError(
            "the input's files changed while the run went on, so that its rows are no longer those of the results. "
            "Put the files back as they were and rerun the same command, or start with another run.dir"
        )
    index = index_journal(run_dir.journal)
    _check_complete(index, len(rows))
    try:
        temporary = run_dir.path / ".dataset.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # left by a crash; the journal has all rows
        temporary.mkdir()
        with JournalReader(index) as reader:
            # The index holds every row once, sorted: entry i is row i.
            read_results = reader.iter_batches
            if dataset_format.file_format == OPENAI_BATCH:
                stats = write_response_files(temporary, rows, read_results, run_dir.read_metadata(), rows_per_file)
            else:
                stats = write_dataset_files(temporary, rows, read_results, dataset_format, rows_per_file)
        run_dir.mark_unfinished()
        publish_directory(temporary, run_dir.dataset)
    except DamagedRecord as error:
        raise RowsLost(error.path, repair_segment(error.path)) from None
    except OSError as error:
        raise DpgenError(
            f"{run_dir.dataset} can't be written: {error.strerror}. The rows are safe in {run_dir.journal}: "
            "free space, then rerun the same command to resume"
        ) from None
    success = stats.to_dict() | ({"jsonl_encoding": JSONL_ENCODING} if dataset_format.file_format == "jsonl" else {})
    atomic_write_text(run_dir.success, json.dumps(success, indent=2) + "\n")
    examples = {"first_error": stats.first_error, "most_frequent_error": stats.most_frequent_error}
    return {**stats.to_dict(), **examples}


def _check_complete(index: JournalIndex, num_rows: int) -> None:
    missing = np.setdiff1d(np.arange(num_rows), index.row)
    unknown = index.row[(index.row < 0) | (index.row >= num_rows)]
    if len(missing) or len(unknown):
        raise DpgenError(
            f"the journal lacks {len(missing):,} of {format_count(num_rows, 'row')}"
            + (f" (first: row {missing[0]})" if len(missing) else "")
            + (f" and holds {format_count(len(unknown), 'row')} that the input does not have" if len(unknown) else "")
            + ". Rerun the same command to generate the missing rows"
        )


def write_dataset_files(
    directory: Path,
    rows: InputRows,
    read_results: ResultReader,
    dataset_format: DatasetFormat,
    rows_per_file: int,
) -> ResultStats:
    """Write the files of a dataset, and beside JSON lines the card with their types, into a directory.

    Parquet files hold the types themselves, and pandas and Polars read a folder of them alone.

    Args:
        read_results: see `DatasetTables`.
    """
    stats, tables = ResultStats(), DatasetTables(rows, dataset_format, read_results)
    schema = tables.schema
    if len(rows) and dataset_format.file_format == "jsonl":
        write_card(directory, build_card_schema(schema))
    with _FileSetWriter(directory, dataset_format, schema, rows_per_file) as writer:
        for table in tables.iter_tables(on_result=stats.add):
            writer.write(table)
    return stats


class _FileSetWriter:
    """Write tables to the files of the final dataset."""

    def __init__(self, directory: Path, dataset_format: DatasetFormat, schema: pa.Schema, rows_per_file: int) -> None:
        self._format, self._schema = dataset_format, schema
        self._encodings = choose_encodings(schema, list_float_columns(dataset_format))
        self._files = FileSet(directory, dataset_format.file_format, self._open, rows_per_file)

    def __enter__(self) -> _FileSetWriter:
        self._files.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def write(self, table: pa.Table) -> None:
        """Append the rows of a table."""
        for file, start, count in self._files.allot(table.num_rows):
            self._write_part(file, table.slice(start, count))

    def _open(self, path: Path) -> Any:
        import pyarrow.parquet as pq

        if self._format.file_format == "parquet":
            return pq.ParquetWriter(path, self._schema, compression="zstd", **self._encodings)
        return path.open("w", encoding="utf-8")

    def _write_part(self, file: Any, part: pa.Table) -> None:
        if self._format.file_format == "parquet":
            file.write_table(part)
        else:
            file.writelines(iter_json_lines(part))


def choose_encodings(schema: pa.Schema, float_columns: Sequence[str]) -> dict[str, Any]:
    """Return how a Parquet file encodes columns of log-probabilities; nothing if there are none.

    Such a number takes more than 4 bytes in a dictionary, and 3.2 where its bytes are split. Ids of tokens stay in a
    dictionary, since few of them are different.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not float_columns:
        return {}
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    columns = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    paths = [columns.column(index).path for index in range(len(columns))]
    split = [path for path in paths if path.startswith(tuple(f"{name}.list." for name in float_columns))]
    others = [path for path in paths if path not in split]
    return {"use_dictionary": others, "use_byte_stream_split": split}
