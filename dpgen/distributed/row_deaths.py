"""Agree on the rows that ranks died on: from the notes that dead ranks left on every node, and from the store."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path

import numpy as np

from dpgen.distributed.group import RankGroup
from dpgen.journal.row_notes import RowDeath, decode_overdue, get_overdue_key, judge_rows, read_deaths
from dpgen.records import RowError

logger = logging.getLogger(__name__)


class RowDeathJudge:
    """Judge rows together with all other ranks, at the start of an attempt and after each loss of ranks.

    Args:
        journal_dir: this rank's journal directory.
        note_name: of this rank's note; see `dpgen.journal.row_notes`.
        render_timeout_s: seconds that a row may take.

    Attributes:
        errors: rows to reject, with their errors; the same on every rank.
        suspects: rows that one process died on; the same on every rank.
    """

    def __init__(self, group: RankGroup, journal_dir: Path, note_name: str, render_timeout_s: float) -> None:
        self._group, self._journal_dir, self._note_name = group, journal_dir, note_name
        self._render_timeout_s = render_timeout_s
        self._names: set[str] = set()  # notes of all ranks that have ever been alive in this attempt
        self.errors: dict[int, RowError] = {}
        self.suspects: set[int] = set()

    def judge(self, finished: np.ndarray) -> None:
        """Read the notes of ranks that are no longer alive, and judge their rows. Collective.

        Args:
            finished: rows with a result in this node's journals, int64, ascending.
        """
        alive: list[str] = self._group.all_gather_object(self._note_name)
        gathered = chain.from_iterable(self._group.all_gather_object(self._find_deaths(alive, finished)))
        self._names.update(alive)
        errors, suspects = judge_rows([RowDeath(*death) for death in gathered], self._render_timeout_s)
        if self._group.rank == 0:
            self._report({row: errors[row] for row in errors.keys() - self.errors.keys()}, suspects - self.suspects)
        self.errors, self.suspects = errors, suspects

    def _find_deaths(self, alive: list[str], finished: np.ndarray) -> list[list[int]]:
        """Return what this rank can read: on a node's first rank the notes there, on rank 0 also the store."""

        def has_result(row: int) -> bool:
            return row in finished[np.searchsorted(finished, row) :][:1]

        deaths = read_deaths(self._journal_dir, alive, has_result) if self._group.is_node_leader else []
        for name in self._names.difference(alive) if self._group.rank == 0 else ():
            word = self._group.checked_store.add(get_overdue_key(name), 0)
            if (death := decode_overdue(name, word, self._render_timeout_s)) is not None:
                deaths.append(death)
        return [list(death) for death in deaths]

    def _report(self, errors: dict[int, RowError], suspects: set[int]) -> None:
        for row, error in sorted(errors.items()):
            logger.warning(f"row {row}: {error.message}, recording error {error.type}")
        for row in sorted(suspects):
            logger.warning(f"row {row}: a process died while it worked on this row, leaving it to the end")
