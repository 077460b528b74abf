"""Open the rows that an export reads: those of a finished dataset, or those that the journal has so far.

- A finished run is read from RUN_DIR/dataset, so neither the input nor the journal has to be there any more.
- An unfinished run is read from its journal and its input, in input order. So are conversations that no column of the
  dataset holds, and runs whose dataset is a response file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dpgen.config.loader import load
from dpgen.config.schema import Config
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.data.saved_dataset import iter_typed_tables, read_card
from dpgen.errors import ConfigError, DpgenError
from dpgen.formatting import format_count
from dpgen.journal.reader import JournalIndex, JournalReader, index_journal
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import describe_left_out, diff_input, find_fingerprint, get_num_rows
from dpgen.output.columns import DatasetFormat
from dpgen.output.dataset_check import compute_batch_rows
from dpgen.output.dataset_tables import DatasetTables
from dpgen.output.file_set import REWRITE_HINT, list_files

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class ExportSource:
    """Give the rows of a run as Arrow tables.

    Attributes:
        metadata: the content of run.json.
        dataset_format: what the tables' columns are.
        schema: of each table.
        num_rows: rows of the input.
        num_done: those of them that have a result.
        iter_tables: yields the tables, in input order.
    """

    metadata: Mapping[str, Any]
    dataset_format: DatasetFormat
    schema: pa.Schema
    num_rows: int
    num_done: int
    iter_tables: Callable[[], Iterator[pa.Table]]

    @property
    def is_complete(self) -> bool:
        """Return True if every row of the input has a result."""
        return self.num_done == self.num_rows


def open_source(run_dir: RunDir, *, with_messages: bool) -> ExportSource:
    """Return the rows of a run.

    Args:
        with_messages: there must be a column `messages` with the conversation of each row and the model's turn.

    Raises:
        ConfigError: there is no run; or its input is needed, and is not there or has changed.
        DpgenError: no row has a result yet, or files of the run are missing or can't be read.
    """
    metadata = run_dir.read_metadata()
    num_rows = get_num_rows(metadata)
    if num_rows is None:
        raise ConfigError(f"RUN_DIR={run_dir.path}: there is no run.json of a run, so this is no run directory")
    dataset_format = DatasetFormat.from_identity(metadata["identity"], metadata=metadata)
    if with_messages and (reason := _find_missing_answers(dataset_format)) is not None:
        raise ConfigError(
            f"--format messages needs the model's answers to chats, and {reason}: choose another format, e.g. "
            "--format jsonl"
        )
    # JSON lines without a row have no types, and responses are no rows.
    is_typed = dataset_format.file_format == "parquet" or (dataset_format.file_format == "jsonl" and num_rows > 0)
    if run_dir.is_finished and is_typed and (dataset_format.messages is not None or not with_messages):
        return _open_dataset(run_dir, metadata, dataset_format, num_rows)
    config = load([str(run_dir.path / "config.yaml")], [])
    if with_messages:
        dataset_format = _add_messages(dataset_format, config)
    return _open_journal(run_dir, metadata, dataset_format, _open_input(config, metadata))


def _open_dataset(
    run_dir: RunDir, metadata: Mapping[str, Any], dataset_format: DatasetFormat, num_rows: int
) -> ExportSource:
    files, problem = list_files(run_dir.dataset, dataset_format.file_format)
    if problem is not None:
        raise DpgenError(f"{run_dir.path}: {problem}: {REWRITE_HINT}")
    if dataset_format.file_format == "jsonl":
        schema = read_card(run_dir.dataset)
        encoding = int(run_dir.read_success().get("jsonl_encoding", 1))
        return ExportSource(
            metadata, dataset_format, schema, num_rows, num_rows, lambda: iter_typed_tables(files, schema, encoding)
        )
    import pyarrow.parquet as pq

    def iter_tables() -> Iterator[pa.Table]:
        import pyarrow as pa

        for path in files:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(compute_batch_rows(file.metadata)):
                    yield pa.Table.from_batches([batch])

    schema = pq.read_schema(files[0])
    return ExportSource(metadata, dataset_format, schema, num_rows, num_rows, iter_tables)


def _find_missing_answers(dataset_format: DatasetFormat) -> str | None:
    """Return why no row of a run has an answer of the model; None if rows may have some."""
    if dataset_format.pooling is not None:
        return f"task={dataset_format.pooling.task} gives none"
    if dataset_format.is_program:
        return "the result of program.function has the columns that it returned"
    return "this run scored given completions" if dataset_format.is_scored else None


def _add_messages(dataset_format: DatasetFormat, config: Config) -> DatasetFormat:
    if config.prompt.request_column is not None:
        raise ConfigError(
            "--format messages needs a chat in each row, and the rows of a batch file are requests: choose another "
            "format, e.g. --format jsonl"
        )
    if not config.prompt.is_chat:
        raise ConfigError(
            "--format messages needs a chat, and this run's prompts are texts (no data.messages_column, "
            "data.as_chat=false): choose another format, e.g. --format jsonl"
        )
    return replace(dataset_format, messages=config.prompt, explode=dataset_format.has_samples)


def _open_input(config: Config, metadata: Mapping[str, Any]) -> InputRows:
    """Return the input, which must be the run's, but may have grown at its end."""
    rows = load_input(config.data)
    fingerprint = find_fingerprint(rows, metadata)
    if differences := diff_input(rows, fingerprint, metadata):
        if (reason := describe_left_out(rows.unreadable, fingerprint, metadata)) is not None:
            raise ConfigError(
                f"the input can't be compared with the run's: {reason}. Export it with the version of dpgen that began "
                "the run"
            )
        raise ConfigError(
            f"the input has changed since the run, so its rows are no longer those of the results: "
            f"{'; '.join(differences)}. Put data.path={config.data.path} back as it was"
        )
    return rows


def _open_journal(
    run_dir: RunDir, metadata: Mapping[str, Any], dataset_format: DatasetFormat, rows: InputRows
) -> ExportSource:
    num_rows = metadata["identity"]["input"]["num_rows"]
    index = index_journal(run_dir.journal)
    row_ids = index.row[(index.row >= 0) & (index.row < num_rows)]
    if num_rows and not len(row_ids):
        raise DpgenError(f"there is nothing to export: none of the run's {format_count(num_rows, 'row')} has a result")
    schema = DatasetTables(rows, dataset_format, lambda _: iter(())).schema

    def iter_tables() -> Iterator[pa.Table]:
        with JournalReader(index) as reader:
            tables = DatasetTables(
                rows, dataset_format, lambda wanted: reader.iter_batches(_find_positions(index, wanted))
            )
            yield from tables.iter_tables(row_ids)

    return ExportSource(metadata, dataset_format, schema, num_rows, len(row_ids), iter_tables)


def _find_positions(index: JournalIndex, row_ids: np.ndarray) -> np.ndarray:
    """Return where an index has rows, which it must have: int64[num_rows]."""
    positions: np.ndarray = np.searchsorted(index.row, row_ids)
    return positions
