"""Find what journals hold of rows that were begun and have no result, so that no attempt at them is repeated.

- Attempts of a try that has ended with an error are counted, so that another try (`run.retry_errors`) has other
  numbers, hence other seeds. They are older than the error's record.
- All others are those of the present try, and are kept as records: of as many rows as ranks had in flight at a death.
- The first rank of each node reads its journal; all ranks get what all of them found.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from dpgen.distributed.group import RankGroup
from dpgen.journal.format import parse_name
from dpgen.journal.reader import DamagedRecord, JournalIndex, JournalReader, index_attempts
from dpgen.records import RequestId

logger = logging.getLogger(__name__)


class Attempt(Protocol):
    """Interface of what a record holds: a `RejectedAttempt`, or a `FinishedCall` of a row's program."""

    @property
    def id(self) -> RequestId: ...


A = TypeVar("A", bound=Attempt)


class EarlierAttempts(NamedTuple, Generic[A]):
    """Hold what is known of a row's earlier attempts.

    Attributes:
        first: number of the first attempt of the present try.
        current: attempts of the present try, in their order.
    """

    first: int
    current: list[A]


class AttemptStore(Generic[A]):
    """Keep the earlier attempts at rows without a result, or the finished calls of their programs.

    They are the same on every rank.

    Args:
        journal_dir: this rank's journal directory.
        decode: returns what a record holds; None for what is no attempt of this kind.
    """

    def __init__(self, journal_dir: Path, group: RankGroup, decode: Callable[[bytes], A | None]) -> None:
        self._journal_dir, self._group, self._decode = journal_dir, group, decode
        self._num_ended: Counter[int] = Counter()
        self._current: dict[int, dict[RequestId, A]] = {}

    def find(self, row: int) -> EarlierAttempts[A] | None:
        """Return the earlier attempts at a row; None if there are none."""
        first, current = self._num_ended[row], self._current.get(row, {})
        if not first and not current:
            return None
        ordered = sorted(current.values(), key=lambda attempt: attempt.id.attempt)
        return EarlierAttempts(ordered[0].id.attempt if ordered else first, ordered)

    def add(self, records: Iterable[bytes]) -> None:
        """Add records of the present try."""
        for record in records:
            if (attempt := self._decode(record)) is not None:
                self._current.setdefault(attempt.id.row, {})[attempt.id] = attempt

    def read(self, is_done: np.ndarray) -> None:
        """Read the journals, and drop what was known before. Collective.

        Args:
            is_done: rows that are not planned, bool[num_rows].

        Raises:
            DpgenError: a segment can't be read.
        """
        self._num_ended.clear()
        self._current.clear()

        def is_wanted(rows: np.ndarray) -> np.ndarray:
            wanted: np.ndarray = rows < len(is_done)
            wanted[wanted] = ~is_done[rows[wanted]]
            return wanted

        attempts: JournalIndex | None = None
        errors: dict[int, int] = {}
        if self._group.is_node_leader:
            attempts, errors = index_attempts(self._journal_dir, is_wanted)
        ended_by: dict[int, int] = {}  # row → attempt of the job in which the row got its last error
        for rows, job_attempts in self._group.all_gather_object([list(errors), list(errors.values())]):
            for row, job_attempt in zip(rows, job_attempts, strict=True):
                ended_by[row] = max(ended_by.get(row, 0), job_attempt)
        own = ([], []) if attempts is None else _split_attempts(attempts, ended_by)
        ended: set[tuple[Any, ...]] = set()  # nodes may share a directory
        current: list[tuple[int, bytes]] = []
        for places, records in self._group.all_gather_object(list(own)):
            ended.update(map(tuple, places))
            current += records
        current.sort(key=lambda entry: entry[0])  # what a later attempt of the job has asked anew counts
        self.add(record for _, record in current)
        self._num_ended.update(row for row, *_ in ended)


def _split_attempts(
    attempts: JournalIndex, ended_by: Mapping[int, int]
) -> tuple[list[list[Any]], list[tuple[int, bytes]]]:
    """Return the places of attempts of ended tries, as [row, segment, offset], and the records of all others.

    Each record comes with the attempt of the job that wrote it.
    """
    places: list[list[Any]] = []
    records: list[tuple[int, bytes]] = []
    with JournalReader(attempts) as reader:
        for position, row in enumerate(attempts.row.tolist()):
            path = attempts.files[attempts.file[position]]
            key = parse_name(path.name)
            assert key is not None
            if key[0] <= ended_by.get(row, 0):
                places.append([row, path.name, int(attempts.offset[position])])
                continue
            try:
                records.append((key[0], reader.payload(position)))
            except DamagedRecord:
                logger.warning(f"the journal {path} is damaged: an attempt at row {row} is repeated")
    return places, records
