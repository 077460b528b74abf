"""Compare RUN_DIR/dataset with the journal and with the input, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpgen.data.input_rows import InputRows
from dpgen.data.prompts.chat import Message
from dpgen.data.reading.python_values import to_python_values
from dpgen.formatting import format_rows
from dpgen.journal.reader import BATCH_ROWS, JournalIndex, JournalReader
from dpgen.output.column_values import Entry
from dpgen.output.columns import DatasetFormat, build_result_arrays, list_entries
from dpgen.output.conversations import ConversationReader
from dpgen.output.file_set import list_files
from dpgen.output.json_lines import to_json_columns
from dpgen.output.result_columns.messages_column import MESSAGES
from dpgen.output.result_stats import ResultStats
from dpgen.records import RowResult

BATCH_BYTES = 16 << 20  # of a file; a number is 4 bytes there, and a Python object and some digits of JSON here


class ResultLookup:
    """Look up the journal's results by row.

    Args:
        others: results of rows that have several, without those in `index`; see `index_other_results`.
    """

    def __init__(self, index: JournalIndex, reader: JournalReader, others: JournalReader | None = None) -> None:
        self.index = index
        self._reader, self._others = reader, others

    def get_many(self, rows: Iterable[int]) -> Iterator[RowResult | None]:
        """Yield the result of each row; None if the journal has none."""
        wanted = np.fromiter(rows, np.int64)
        positions = np.searchsorted(self.index.row, wanted)
        is_present = positions < len(self.index)
        is_present[is_present] = self.index.row[positions[is_present]] == wanted[is_present]
        results = chain.from_iterable(self._reader.iter_batches(positions[is_present]))
        for has_result in is_present:
            yield next(results) if has_result else None

    def get_others(self, row: int) -> Iterator[RowResult]:
        """Yield the row's other results."""
        if self._others is not None:
            rows = self._others.index.row
            positions = np.arange(*np.searchsorted(rows, [row, row + 1]))
            yield from chain.from_iterable(self._others.iter_batches(positions))


@dataclass
class DatasetFindings:
    """Report what a dataset holds.

    Attributes:
        num_rows: rows in the files that can be read.
        problems: one sentence each.
        notes: one sentence each about what was not checked.
        stats: of the journal's results; None unless the dataset holds every row once and in input order.
    """

    num_rows: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stats: ResultStats | None = None


class DatasetCheck:
    """Check the files of a dataset; call `run` once.

    Args:
        num_rows: rows of the input.
        rows: the input to compare with; None to leave the input out.
        stats: collects the journal's results in the order of the dataset.
    """

    def __init__(
        self,
        dataset_dir: Path,
        dataset_format: DatasetFormat,
        num_rows: int,
        results: ResultLookup,
        rows: InputRows | None,
        stats: ResultStats,
    ) -> None:
        self._dataset_dir, self._format, self._results, self._rows = dataset_dir, dataset_format, results, rows
        self._num_seen = np.zeros(num_rows, np.int64)  # how often the dataset holds each row
        self._num_expected = np.ones(num_rows, np.int64)  # more than one where each sample is a row of its own
        self._last_place = (-1, -1)  # row and sample
        self._differing_rows: dict[str, list[int]] = {}  # what differs → in which rows
        self._stats = stats
        self._is_ordered = True
        self._findings = DatasetFindings()

    def run(self) -> DatasetFindings:
        """Read and compare all files."""
        findings = self._findings
        files, problem = list_files(self._dataset_dir, self._format.file_format)
        findings.problems += [problem] if problem else []
        for path in files:
            try:
                for batch in _iter_batches(path):
                    self._check_batch(path, batch)
            # pyarrow's own errors are OSError or ValueError; a date that Python can't hold is an OverflowError.
            except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
                findings.problems.append(f"dataset/{path.name} can't be read: {_get_first_line(error)}")
        is_short, is_doubled = self._num_seen < self._num_expected, self._num_seen > self._num_expected
        for sentence, is_wrong in (
            ("lacks rows", self._num_seen == 0),
            ("lacks samples of rows", is_short & (self._num_seen > 0)),
            ("holds more than once rows", is_doubled),
        ):
            if is_wrong.any():
                findings.problems.append(f"the dataset {sentence}: {format_rows(np.flatnonzero(is_wrong))}")
        for difference, rows in self._differing_rows.items():
            findings.problems.append(f"the dataset's {difference}: {format_rows(np.array(rows))}")
        if self._is_ordered and not (is_short | is_doubled).any():
            findings.stats = self._stats
        return findings

    def _check_batch(self, path: Path, batch: dict[str, list[Any]]) -> None:
        row_ids = np.array(batch["row_id"], np.int64)
        if not len(row_ids):
            return
        self._findings.num_rows += len(row_ids)
        if ((row_ids < 0) | (row_ids >= len(self._num_seen))).any():
            raise ValueError("it holds a row_id that the input does not have")
        np.add.at(self._num_seen, row_ids, 1)
        samples = batch["sample_id"] if self._format.explode else [None] * len(row_ids)
        places = [self._last_place, *zip(row_ids.tolist(), (sample or 0 for sample in samples), strict=True)]
        if any(place >= following for place, following in pairwise(places)):
            self._findings.problems.append(f"dataset/{path.name} is not in input order")
            self._is_ordered = False
        self._last_place = places[-1]
        self._compare_results(row_ids, samples, batch)
        if self._rows is not None and not self._rows.is_empty:
            self._compare_input(self._rows, row_ids, batch)

    def _compare_results(self, row_ids: np.ndarray, samples: list[int | None], batch: dict[str, list[Any]]) -> None:
        positions, entries = [], []
        conversations = self._read_conversations(row_ids)
        for position, result in enumerate(self._results.get_many(row_ids)):
            if result is None:
                continue
            entry = Entry(result, samples[position], conversations[position] if conversations else None)
            entry = self._select_entry(entry, batch, position)
            if not self._has_sample(entry):
                raise ValueError(f"row {result.row} has a sample_id that its result does not have: {entry.sample}")
            if not entry.sample:  # a row's first entry
                self._stats.add(entry.result)
                self._num_expected[result.row] = len(list_entries([entry.result], self._format))
            positions.append(position)
            entries.append(entry)
        for name, values in self._build_expected(entries).items():
            actual = [batch[name][position] for position in positions]
            self._compare(f"{name} differs from the journal's", row_ids[positions], values, actual)

    def _select_entry(self, entry: Entry, batch: dict[str, list[Any]], position: int) -> Entry:
        """Return the entry with that result of its row which the dataset was made from.

        A rank that was cut off may have journaled the row again since, in a segment that comes before.
        """

        def is_source(candidate: Entry) -> bool:
            expected = {name: values[0] for name, values in self._build_expected([candidate]).items()}
            return self._has_sample(candidate) and _to_canonical_json(expected) == _to_canonical_json(
                {name: batch[name][position] for name in expected}
            )

        others = [entry._replace(result=other) for other in self._results.get_others(entry.result.row)]
        return next(filter(is_source, [entry, *others]), entry) if others else entry

    def _has_sample(self, entry: Entry) -> bool:
        return not self._format.explode or entry.sample in (range(len(entry.result.completions)) or (None,))

    def _build_expected(self, entries: list[Entry]) -> dict[str, list[Any]]:
        """Return the columns that results add, but those that can't be checked without the input."""
        can_check_messages = self._rows is not None and not self._rows.is_empty
        arrays = build_result_arrays(entries, self._format)
        return {name: values.to_pylist() for name, values in arrays.items() if name != MESSAGES or can_check_messages}

    def _read_conversations(self, row_ids: np.ndarray) -> list[list[Message] | None] | None:
        """Return the rows' conversations; None where no column holds them, or without the input."""
        if self._format.messages is None or self._rows is None or self._rows.is_empty:
            return None
        return ConversationReader(self._rows, self._format.messages).read(row_ids)

    def _compare_input(self, rows: InputRows, row_ids: np.ndarray, batch: dict[str, list[Any]]) -> None:
        kept_columns = self._format.select_kept_columns(rows.columns)
        if not kept_columns:  # `datasets` takes a table without columns for one without rows
            return
        table = rows.dataset.select_columns(kept_columns).with_format("arrow")[row_ids.tolist()]
        if self._format.file_format == "jsonl":
            expected = to_json_columns(table, self._format.jsonl_encoding)
        else:
            expected = {name: to_python_values(table[name]) for name in table.column_names}
        for name in kept_columns:
            self._compare(f"{name} differs from the input's", row_ids, expected[name], batch[name])

    def _compare(self, difference: str, row_ids: np.ndarray, expected: list[Any], actual: list[Any]) -> None:
        """Note the rows in which two columns differ."""
        if _to_canonical_json(expected) == _to_canonical_json(actual):
            return
        for row, one, other in zip(row_ids.tolist(), expected, actual, strict=True):
            if _to_canonical_json(one) != _to_canonical_json(other):
                self._differing_rows.setdefault(difference, []).append(row)


def _iter_batches(path: Path) -> Iterator[dict[str, list[Any]]]:
    """Yield the rows of one file of the dataset as columns, in batches."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(compute_batch_rows(file.metadata)):
                yield dict(zip(batch.schema.names, map(to_python_values, batch.columns), strict=True))
        return
    with path.open(encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = []
        num_chars = 0
        for line in lines:
            rows.append(json.loads(line))
            num_chars += len(line)
            if len(rows) == BATCH_ROWS or num_chars >= BATCH_BYTES:
                yield _to_columns(rows)
                rows, num_chars = [], 0
        if rows:
            yield _to_columns(rows)


def _to_columns(rows: list[Any]) -> dict[str, list[Any]]:
    """Return rows of JSON lines as columns.

    Raises:
        ValueError: a row is no object, lacks a column of the others, or has one more.
    """
    if not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        raise ValueError("its lines are not objects with the same columns")
    return {name: [row[name] for row in rows] for name in rows[0]}


def compute_batch_rows(metadata: Any) -> int:
    """Return how many rows of a Parquet file fit in a batch, by its group with the largest rows."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    bytes_per_row = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, bytes_per_row)))


def _to_canonical_json(value: Any) -> str:
    """Return a form in which equal values are equal, including NaN and values that JSON can't represent."""
    return json.dumps(value, default=str)


def _get_first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
