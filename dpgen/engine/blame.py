"""Keep one rank's rows on their way through its engine, and find the rows that kill it. No process, no clock.

- A row is in one place: in flight (the engine has it), waiting, or quarantined.
- A row that was in flight at two deaths is quarantined: it runs alone, before all waiting rows.
- A row that kills the engine while alone is finished with the error `poison_row`. Kills from outside count only at
  the fourth, all while alone; running out of memory never counts.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable

from dpgen.errors import EngineError
from dpgen.records import Request, RowError, RowResult

logger = logging.getLogger(__name__)

_ISOLATE_AFTER_DEATHS = 2
_MAX_ISOLATED_KILLS = 4  # one SIGKILL is hardly the row's fault; four, each while it was alone, are


class BlameTracker:
    """Decide which rows the engine gets next, and what its death means for the rows that it had.

    Attributes:
        in_flight: rows that the engine has.
    """

    def __init__(self) -> None:
        self.in_flight: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()  # rows that the engine gets as soon as it can take them
        self._quarantined: deque[Request] = deque()  # rows that the engine gets one at a time
        self._deaths_of_row: Counter[int] = Counter()
        self._isolated_deaths: Counter[int] = Counter()

    @property
    def num_unfinished(self) -> int:
        return len(self.in_flight) + len(self._waiting) + len(self._quarantined)

    def add(self, requests: Iterable[Request]) -> None:
        """Add rows that wait for the engine."""
        self._waiting.extend(requests)

    def take_batch(self) -> list[Request]:
        """Return the rows to submit now, which are in flight from now on; quarantined rows go first, each alone."""
        batch: list[Request] = []
        if self._quarantined:
            if not self.in_flight:
                batch = [self._quarantined.popleft()]
        elif not self._is_isolating_row:
            batch = list(self._waiting)
            self._waiting.clear()
        self.in_flight |= {request.row: request for request in batch}
        return batch

    def finish(self, row: int) -> Request:
        """Remove a row that the engine has finished."""
        return self.in_flight.pop(row)

    def record_death(self, error: EngineError) -> RowResult | None:
        """Return the rows in flight to those that wait; return the result of a row found to be poison."""
        was_isolated = self._is_isolating_row
        suspects, self.in_flight = list(self.in_flight.values()), {}
        if was_isolated and not error.is_out_of_memory:
            [poison] = suspects
            self._isolated_deaths[poison.row] += 1
            if error.is_external_kill and self._isolated_deaths[poison.row] < _MAX_ISOLATED_KILLS:
                self._quarantined.append(poison)  # behind the other quarantined rows
                return None
            logger.warning(f"row {poison.row} killed its engine while it ran alone, recording error poison_row")
            message = f"this row killed its engine while it ran alone: {error.first_line}"
            return RowResult(poison.row, error=RowError("poison_row", message))
        self._deaths_of_row.update(request.row for request in suspects)
        for request in reversed(suspects):
            if self._deaths_of_row[request.row] >= _ISOLATE_AFTER_DEATHS and not error.is_out_of_memory:
                self._quarantined.appendleft(request)
            else:
                self._waiting.appendleft(request)
        return None

    @property
    def _is_isolating_row(self) -> bool:
        return len(self.in_flight) == 1 and self._deaths_of_row[next(iter(self.in_flight))] >= _ISOLATE_AFTER_DEATHS
