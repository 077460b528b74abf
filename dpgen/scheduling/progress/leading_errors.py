"""Stop a run whose rows all fail, since the cause is then in the configuration and not in the rows.

- Counts only while no row of the run has ever succeeded: a resumed run may have nothing left but rows that fail.
- Rows that come first may fail for a reason of their own: the longest rows exceed the context. So before the run stops,
  a few rows from the rest of the order are tried (`RowOrder.spread_first`).
- Decides by totals, which are the same on every rank. So all ranks decide the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from dpgen.errors import DpgenError, PeerFailed
from dpgen.formatting import format_count
from dpgen.records import RowError, RowResult
from dpgen.scheduling.progress.totals import Totals

_FAILING_ROUNDS = 3  # syncs in a row with nothing but errors, before rows are tried or the run stops


class LeadingErrorCheck:
    """Decide when to try rows from the rest of the order, and when to stop.

    Args:
        max_errors: `run.max_leading_errors`; 0 never stops.

    Attributes:
        num_tried: rows of the trial that this rank has finished, for the ranks to sum.
    """

    def __init__(self, max_errors: int) -> None:
        self._max_errors = max_errors
        self._num_failing_rounds = 0
        self._first_error: tuple[int, RowError] | None = None
        self._trial: frozenset[int] | None = None
        self.num_tried = 0

    def record(self, result: RowResult) -> None:
        """Count a finished row of this rank."""
        if result.error is not None and self._first_error is None:
            self._first_error = result.row, result.error
        if self._trial is not None and result.row in self._trial:
            self.num_tried += 1

    def start_trial(self, rows: Iterable[int]) -> None:
        """Require these rows, of all ranks, to fail as well before the run stops."""
        self._trial, self.num_tried, self._num_failing_rounds = frozenset(rows), 0, 0

    def drop_trial(self) -> None:
        """Forget the trial: its rows may be those of a lost rank."""
        self._trial, self.num_tried, self._num_failing_rounds = None, 0, 0

    def needs_trial(self, totals: Totals, *, has_completions: bool) -> bool:
        """Return True if all rows have failed so far, and rows from the rest of the order are to be tried now.

        Args:
            totals: of all ranks; call once for each sync.
            has_completions: whether a row of the run had succeeded before the last plan.

        Raises:
            DpgenError: all rows have failed, those of the trial included; on a rank that has seen an error.
            PeerFailed: the same, on the other ranks.
        """
        if has_completions or not 0 < self._max_errors <= totals.num_errors == totals.num_rows:
            self._num_failing_rounds = 0
            return False
        # Rows that the engine got a moment ago have the time to succeed.
        self._num_failing_rounds = 0 if totals.num_ranks_generating else self._num_failing_rounds + 1
        if totals.num_unfinished_ranks:
            if self._num_failing_rounds < _FAILING_ROUNDS:
                return False
            if self._trial is None:
                return True
            if totals.num_tried < len(self._trial):
                return False
        raise self._make_error(totals)

    def _make_error(self, totals: Totals) -> DpgenError:
        problem = "the first row failed" if totals.num_rows == 1 else f"the first {totals.num_rows:,} rows all failed"
        if self._trial:
            problem += f", {format_count(len(self._trial), 'row')} from the rest of the order among them"
        if self._first_error is None:
            return PeerFailed(problem)  # a rank that has seen an error reports it
        row, error = self._first_error
        return DpgenError(
            f"{problem} (run.max_leading_errors={self._max_errors}), so the cause is probably in the "
            "configuration. Fix it and rerun with run.resume=force, or in another run.dir if the input changes, or set "
            f"run.max_leading_errors=0 to continue regardless. Row {row} failed with {error.type}: {error.message}"
        )
