"""Give the rows of a job as they are finished, each once, from its journal.

- The engine never waits for the consumer: finished rows are in the journal, and are read from there.
- Memory stays flat: one batch of rows, and a byte for each row of the input.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dpgen.api.jobs import Outcome
from dpgen.api.processes import RankProcesses
from dpgen.config.schema import Config
from dpgen.data.input_loading import load_input
from dpgen.data.reading.json_types import to_python
from dpgen.data.saved_dataset import keep_quiet
from dpgen.errors import NoRowSucceeded
from dpgen.journal.reader import JournalReader, index_journal
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import get_num_rows
from dpgen.journal.tail import JournalTail
from dpgen.output.columns import DatasetFormat
from dpgen.output.dataset_tables import DatasetTables
from dpgen.records import RowResult

_POLL_S = 0.1


class RowStream:
    """Follow a job that has been submitted to its ranks.

    Args:
        last_attempt: the number of the run's attempt before this job; 0 for none.
    """

    def __init__(self, config: Config, ranks: RankProcesses, last_attempt: int) -> None:
        self._config, self._ranks, self._last_attempt = config, ranks, last_attempt
        self._run_dir = RunDir(config.run.dir)
        self._tables: DatasetTables | None = None
        self._is_given = np.zeros(0, bool)
        self.outcome: Outcome | None = None

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """Yield each row once: those of earlier attempts, those of this one, and at the end what is left.

        Afterwards `outcome` tells how the job ended.
        """
        tail = JournalTail(self._run_dir.journal, self._last_attempt)
        while not self._has_begun() and self.outcome is None:
            self._poll()
        if self._is_readable():
            yield from self._iter_journal(with_errors=not self._config.run.retry_errors)
        while self.outcome is None:
            num_before = int(self._is_given.sum())
            for results in tail.read_new():
                yield from self._to_rows(results)
            if int(self._is_given.sum()) == num_before:
                self._poll()
            else:
                self.outcome = self._ranks.poll()
        if self._is_readable() and self.outcome.error_type in (None, NoRowSucceeded.__name__):
            yield from self._iter_journal(with_errors=True)

    def _poll(self) -> None:
        self.outcome = self._ranks.poll()
        if self.outcome is None:
            time.sleep(_POLL_S)

    def _has_begun(self) -> bool:
        """Return True once rank 0 has checked that the run directory is this run's."""
        attempt = self._run_dir.read_metadata().get("attempt")
        return isinstance(attempt, int) and attempt > self._last_attempt

    def _is_readable(self) -> bool:
        is_complete = self.outcome is not None and self.outcome.error_type in (None, NoRowSucceeded.__name__)
        if self._tables is None and (is_complete or self._has_begun()):
            metadata = self._run_dir.read_metadata()
            with keep_quiet():
                rows = load_input(self._config.data)
            dataset_format = DatasetFormat.from_identity(metadata["identity"], metadata=metadata)
            self._tables = DatasetTables(rows, dataset_format, lambda _: iter(()))
            self._is_given = np.zeros(get_num_rows(metadata) or 0, bool)
        return self._tables is not None

    def _iter_journal(self, *, with_errors: bool) -> Iterator[dict[str, Any]]:
        """Yield the rows that the journal has and that were not given yet."""
        index = index_journal(self._run_dir.journal)
        is_wanted = (index.row >= 0) & (index.row < len(self._is_given))
        is_wanted[is_wanted] = ~self._is_given[index.row[is_wanted]]
        if not with_errors:
            is_wanted &= ~index.error
        with JournalReader(index) as reader:
            for results in reader.iter_batches(np.flatnonzero(is_wanted)):
                yield from self._to_rows(results)

    def _to_rows(self, results: Sequence[RowResult]) -> Iterator[dict[str, Any]]:
        assert self._tables is not None
        fresh = {result.row: result for result in results if not self._is_given[result.row]}
        self._is_given[list(fresh)] = True
        for table in self._tables.iter_tables_of(list(fresh.values())):
            columns = {name: to_python(table.column(name)) for name in table.column_names}
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))
