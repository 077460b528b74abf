"""Keep one rank's rows on their way through its engine, and find the rows that kill it. No process, no clock.

- A row is in one place: in flight (the engine has it), waiting, in a group of suspects, or held.
- Rows that were in flight at two deaths become suspects, as one group. The engine gets a group without other rows.
  If the engine dies of a group, its unfinished rows are split in halves, which are tried before smaller groups: one
  poison row among 288 costs about ten deaths, and seldom more than three in a row.
- Kills from outside (SIGKILL, SIGTERM) make suspects only at a row's third, and count against a row that is alone only
  at the fourth, all while alone. Running out of memory never counts.
- A row of which the engine died while the row was alone is held. It becomes `poison_row` once the engine's successor
  has finished another row. The witness is a canary where there is one: the shortest row that this rank's engine has
  finished, or else one that succeeded in an earlier attempt, generated again. Its result is dropped.
- Three held rows with nothing finished between them, or three deaths of the canary, mean that the engine is sick.

Limits: without a canary the verdict waits until some row is finished; a row held alone is tried again meanwhile.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable

from dpgen.errors import EngineError
from dpgen.formatting import format_count
from dpgen.records import Request, RowError, RowResult

logger = logging.getLogger(__name__)

_SUSPECT_AFTER_DEATHS = 2
_SUSPECT_AFTER_KILLS = 3  # two kills within a row's life may both come from outside
_HELD_AFTER_KILLS = 4  # one SIGKILL is hardly the row's fault; four, each while it was alone, are
_MAX_HELD = 3
_MAX_CANARY_DEATHS = 3


class BlameTracker:
    """Decide which rows the engine gets next, and what its death means for the rows that it had.

    Attributes:
        in_flight: rows that the engine has; the canary is not among them.
        canary: the row that is generated again, as a witness that the engine works; None until a row is finished, or
            needed and taken from `find_canary`.
        find_canary: returns the request of a row that succeeded in an earlier attempt; None if there is none. Called
            once, if a verdict needs a witness and no row has been finished.
    """

    def __init__(self) -> None:
        self.in_flight: dict[int, Request] = {}
        self.canary: Request | None = None
        self.find_canary: Callable[[], Request | None] = _find_none
        self._canary_tokens = 0  # tokens of the canary, prompt included
        self._is_canary_in_flight = False
        self._is_trial = False  # the rows in flight are a group of suspects, or what is left of it
        self._is_isolated = False  # the group is one row
        self._waiting: deque[Request] = deque()
        self._groups: deque[list[Request]] = deque()
        self._held: dict[int, tuple[Request, str]] = {}  # rows that killed the engine while alone, and how
        self._deaths_of_row: Counter[int] = Counter()
        self._kills_of_row: Counter[int] = Counter()
        self._isolated_kills: Counter[int] = Counter()
        self._num_canary_deaths = 0
        self._verdicts: list[RowResult] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.in_flight) + len(self._waiting) + sum(map(len, self._groups)) + len(self._held)

    @property
    def is_busy(self) -> bool:
        """True while the engine has anything to generate."""
        return bool(self.in_flight) or self._is_canary_in_flight

    @property
    def sickness(self) -> str:
        """Return why the engine is sick, as the end of "abandoning it after ..."; "" if it is not."""
        if len(self._held) >= _MAX_HELD:
            return f"{len(self._held)} rows killed it one by one and none was finished"
        if self._num_canary_deaths >= _MAX_CANARY_DEATHS:
            return f"{self._num_canary_deaths} deaths on a row that had succeeded before"
        return ""

    def add(self, requests: Iterable[Request]) -> None:
        """Add rows that wait for the engine."""
        self._waiting.extend(requests)

    def take_batch(self) -> list[Request]:
        """Return the rows to submit now; they are in flight from now on.

        The canary goes first, then groups of suspects, each without other rows, then rows that wait. A held row is
        tried again when nothing else is left to run.
        """
        if self.is_busy and (self._is_trial or self._is_canary_in_flight or self._groups or self._awaits_canary):
            return []
        if self._awaits_canary:
            assert self.canary is not None
            self._is_canary_in_flight = True
            return [self.canary]
        self._is_trial = bool(self._groups)
        if self._groups:
            batch = self._groups.popleft()
        elif self._waiting:
            batch = list(self._waiting)
            self._waiting.clear()
        elif self._held and not self.is_busy:
            self._is_trial = True
            row = next(iter(self._held))
            batch = [self._held.pop(row)[0]]
        else:
            return []
        self._is_isolated = self._is_trial and len(batch) == 1
        self.in_flight |= {request.row: request for request in batch}
        return batch

    def finish(self, result: RowResult) -> Request | None:
        """Remove a row that the engine has finished, and return its request; None for the canary's result."""
        request = self._take_in_flight(result)
        if result.error is not None:
            if request is None:  # no witness any more
                self.canary = None
            return request
        num_tokens = (result.num_prompt_tokens or 0) + result.num_generated_tokens
        if request is not None and (self.canary is None or num_tokens < self._canary_tokens):
            self.canary, self._canary_tokens = request, num_tokens
        self._release_held()
        return request

    def take_verdicts(self) -> list[RowResult]:
        """Return the results of rows found to be poison since the last call."""
        verdicts, self._verdicts = self._verdicts, []
        return verdicts

    def record_death(self, error: EngineError) -> None:
        """Return the rows in flight to those that wait, to a group of suspects, or to those held."""
        rows, self.in_flight = list(self.in_flight.values()), {}
        is_canary, self._is_canary_in_flight = self._is_canary_in_flight, False
        if error.is_external_kill and len(rows) == 1:
            self._isolated_kills[rows[0].row] += 1
        if error.is_out_of_memory:
            self._put_back(rows)
        elif is_canary:
            self._num_canary_deaths += not error.is_external_kill
        elif self._is_isolated and rows:
            self._judge_isolated(rows[0], error)
        elif self._count_death(rows, error):
            self._split(rows) if self._is_trial else self._suspect(rows)
        else:
            self._put_back(rows)
        self._is_trial = False

    def _take_in_flight(self, result: RowResult) -> Request | None:
        if self._is_canary_in_flight:
            self._is_canary_in_flight = False
            return None
        for counter in (self._deaths_of_row, self._kills_of_row, self._isolated_kills):
            del counter[result.row]
        return self.in_flight.pop(result.row)

    def _release_held(self) -> None:
        """Decide on the held rows, since the engine works now.

        If the canary killed the engine meanwhile, they get another trial: the engine was sick then.
        """
        held, self._held = self._held, {}
        num_canary_deaths, self._num_canary_deaths = self._num_canary_deaths, 0
        for row, (request, cause) in held.items():
            if num_canary_deaths:
                self._groups.append([request])
                continue
            logger.warning(f"row {row} killed its engine while it ran alone, recording error poison_row")
            message = f"this row killed its engine while it ran alone: {cause}"
            self._verdicts.append(RowResult(row, error=RowError("poison_row", message)))

    @property
    def _awaits_canary(self) -> bool:
        return bool(self._held) and self.canary is not None

    def _put_back(self, rows: list[Request]) -> None:
        """Return rows to where they came from, unblamed, ahead of all others."""
        if self._is_trial and rows:
            self._groups.appendleft(rows)
        else:
            self._waiting.extendleft(reversed(rows))

    def _count_death(self, rows: list[Request], error: EngineError) -> bool:
        """Count a death against its rows, and return True if it blames them."""
        counter = self._kills_of_row if error.is_external_kill else self._deaths_of_row
        counter.update(request.row for request in rows)
        if error.is_external_kill:
            return any(self._kills_of_row[request.row] >= _SUSPECT_AFTER_KILLS for request in rows)
        return True

    def _suspect(self, rows: list[Request]) -> None:
        """Make one group of the rows that were in flight at enough deaths; the others wait again."""
        suspects = [
            request
            for request in rows
            if self._deaths_of_row[request.row] >= _SUSPECT_AFTER_DEATHS
            or self._kills_of_row[request.row] >= _SUSPECT_AFTER_KILLS
        ]
        suspected = {request.row for request in suspects}
        self._waiting.extendleft(request for request in reversed(rows) if request.row not in suspected)
        if suspects:
            self._groups.append(suspects)

    def _split(self, rows: list[Request]) -> None:
        """Try halves behind all other groups: a sibling that survives shows that the engine works."""
        middle = (len(rows) + 1) // 2
        self._groups.extend(half for half in (rows[:middle], rows[middle:]) if half)

    def _judge_isolated(self, request: Request, error: EngineError) -> None:
        """Hold a row that ran alone, unless the engine was killed from outside."""
        if error.is_external_kill and self._isolated_kills[request.row] < _HELD_AFTER_KILLS:
            self._groups.appendleft([request])  # at once: other rows' trials would only add deaths in a row
            return
        self._held[request.row] = (request, error.first_line)
        if self.canary is None:
            self.canary, self.find_canary = self.find_canary(), _find_none
            self._canary_tokens = sys.maxsize  # any row that this engine finishes is a better one
        if self.canary is None:
            held = format_count(len(self._held), "row")
            logger.warning(
                f"row {request.row} killed its engine while it ran alone, no verdict before the engine has finished "
                f"another row, {held} held"
            )


def _find_none() -> Request | None:
    return None
