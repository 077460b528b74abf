"""Join results with the rows that they belong to, as Arrow tables of the dataset.

Memory stays flat: one batch of rows at a time, bounded by rows and by bytes of results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dpgen.data.input_rows import InputRows
from dpgen.journal.reader import BATCH_ROWS
from dpgen.output.column_values import Entry
from dpgen.output.columns import DatasetFormat, build_result_arrays, build_result_schema, list_entries
from dpgen.output.conversations import ConversationReader
from dpgen.records import RowResult

if TYPE_CHECKING:
    import pyarrow as pa

ResultReader = Callable[[np.ndarray], Iterator[list[RowResult]]]


class DatasetTables:
    """Make the tables of a dataset.

    Args:
        rows: the input.
        dataset_format: the dataset's columns.
        read_results: returns the results of rows, given as ascending int64[num_rows], in batches and in this order.

    Attributes:
        schema: of each table, with the features of `datasets`.
    """

    def __init__(self, rows: InputRows, dataset_format: DatasetFormat, read_results: ResultReader) -> None:
        self._rows, self._format, self._read_results = rows, dataset_format, read_results
        self._kept_columns = dataset_format.select_kept_columns(rows.columns)
        messages = dataset_format.messages
        self._conversations = None if messages is None else ConversationReader(rows, messages)
        self.schema: pa.Schema = rows.build_output_schema(build_result_schema(dataset_format), self._kept_columns)

    def iter_tables(
        self, row_ids: np.ndarray | None = None, on_result: Callable[[RowResult], None] = lambda _: None
    ) -> Iterator[pa.Table]:
        """Yield tables of no more rows at a time than are read from the input.

        Args:
            row_ids: int64[num_rows], the input rows to read, ascending; None for all.
            on_result: called with each result, in the order of its row.
        """
        for start, table in self._iter_input_tables():
            wanted = np.arange(start, start + table.num_rows)
            if row_ids is not None:
                wanted = row_ids[slice(*np.searchsorted(row_ids, [start, start + table.num_rows]))]
            for results in self._read_results(wanted) if len(wanted) else ():
                for result in results:
                    on_result(result)
                yield from self._join(lambda row, start=start: row - start, table, results)  # type: ignore[misc]

    def iter_tables_of(self, results: Sequence[RowResult]) -> Iterator[pa.Table]:
        """Yield tables of some results, in any order, each row once at most, with the kept columns of their rows."""
        if not results:
            return
        row_ids = np.array([result.row for result in results], np.int64)
        table = self._rows.read_table(row_ids, self._kept_columns or self._rows.columns[:1])
        yield from self._join({int(row): place for place, row in enumerate(row_ids)}.__getitem__, table, results)

    def _iter_input_tables(self) -> Iterator[tuple[int, pa.Table]]:
        """Yield (index of the first row, table) in input order."""
        start = 0
        # A table without columns has no rows either, so one column is read even if none is kept.
        for table in self._rows.iter_tables(BATCH_ROWS, self._kept_columns or self._rows.columns[:1]):
            yield start, table
            start += table.num_rows

    def _join(
        self, find_place: Callable[[int], int], table: pa.Table, results: Sequence[RowResult]
    ) -> Iterator[pa.Table]:
        """Yield tables of results, each with the kept columns of its row.

        Args:
            find_place: returns where in `table` an input row is.
        """
        read = None if self._conversations is None else self._conversations.read([result.row for result in results])
        entries = list_entries(results, self._format, read)
        for first in range(0, len(entries), len(results)):  # no more rows at a time than the input's
            part = entries[first : first + len(results)]
            yield self._build(_take_rows(table, [find_place(entry.result.row) for entry in part]), part)

    def _build(self, table: pa.Table, entries: Sequence[Entry]) -> pa.Table:
        import pyarrow as pa

        columns = {name: table.column(i) for i, name in enumerate(table.column_names)}
        columns |= build_result_arrays(entries, self._format)
        # Not cast as a whole: pyarrow 26 fails to cast a slice of structs that have a column of type null.
        arrays = [
            columns[field.name] if columns[field.name].type == field.type else columns[field.name].cast(field.type)
            for field in self.schema
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)


def _take_rows(table: pa.Table, positions: list[int]) -> pa.Table:
    """Return rows of a table; a slice, which copies nothing, where they follow each other."""
    is_run = positions == list(range(positions[0], positions[0] + len(positions)))
    return table.slice(positions[0], len(positions)) if is_run else table.take(positions)
