"""Keep one rank's rows on their way through its engine, and find the rows that kill it. No process, no clock.

- A request is in one place: in flight (the engine has it), waiting, in a group of suspects, or held. Rows are blamed:
  all requests for a row have its prompt, and the next attempt's requests for it may be others.
- Rows that were in flight at two deaths become suspects, as one group. The engine gets a group without other rows.
  If the engine dies of a group, its unfinished rows are split in halves, which are tried before smaller groups: one
  poison row among 288 costs about ten deaths, and seldom more than three in a row.
- Kills from outside (SIGKILL, SIGTERM) make suspects only at a row's third, and count against a row that is alone only
  at the fourth, all while alone. Running out of memory never counts.
- A row of which the engine died while the row was alone is held. It becomes `poison_row` once the engine's successor
  has finished another row. The witness is a canary where there is one: the shortest row that this rank's engine has
  finished, or else one that succeeded in an earlier attempt, generated again. Its result is dropped.
- Three held rows with nothing finished between them, or three deaths of the canary, mean that the engine is sick.
- Where an engine's death ends all ranks, the next attempt goes on from their notes (`judge_notes`). Each death costs a
  restart there: suspects are split at once, and a row is tried alone once the engine has finished another.

Limits: without a canary the verdict waits until some row is finished; a row held alone is tried again meanwhile.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence

from dpgen.errors import EngineError
from dpgen.formatting import format_count
from dpgen.journal.engine_notes import BlameState, EngineDeath, EngineNote, find_cause
from dpgen.records import Request, RequestId, RowError, RowResult

logger = logging.getLogger(__name__)

_SUSPECT_AFTER_DEATHS = 2
_SUSPECT_AFTER_KILLS = 3  # two kills within a row's life may both come from outside
_HELD_AFTER_KILLS = 4  # one SIGKILL is hardly the row's fault; four, each while it was alone, are
_MAX_HELD = 3
_MAX_CANARY_DEATHS = 3


class BlameTracker:
    """Decide which rows the engine gets next, and what its death means for the rows that it had.

    Attributes:
        in_flight: requests that the engine has; the canary is not among them.
        canary: the row that is generated again, as a witness that the engine works; None until a row is finished, or
            needed and taken from `find_canary`.
        find_canary: returns the request of a row that succeeded in an earlier attempt; None if there is none. Called
            once, if a verdict needs a witness and no row has been finished.
        num_finished: rows that succeeded, the canary included.
    """

    def __init__(self) -> None:
        self.in_flight: dict[RequestId, Request] = {}
        self.canary: Request | None = None
        self.find_canary: Callable[[], Request | None] = _find_none
        self.num_finished = 0
        self._canary_tokens = 0  # tokens of the canary, prompt included
        self._is_canary_in_flight = False
        self._is_trial = False  # the rows in flight are a group of suspects, or what is left of it
        self._is_isolated = False  # the group is one row
        self._waiting: deque[Request] = deque()
        self._set_aside: dict[RequestId, Request] = {}  # for those of the suspects and the held rows that this rank has
        self._groups: deque[list[int]] = deque()
        self._held: dict[int, str] = {}  # rows that killed the engine while alone, and how
        self._recalled: frozenset[int] = frozenset()  # suspects and held rows of the last attempt
        self._deaths_of_row: Counter[int] = Counter()
        self._kills_of_row: Counter[int] = Counter()
        self._isolated_kills: Counter[int] = Counter()
        self._num_canary_deaths = 0
        self._verdicts: list[RowResult] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.in_flight) + len(self._waiting) + len(self._set_aside)

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
        for request in requests:
            if request.row in self._recalled:
                self._set_aside[request.id] = request
            else:
                self._waiting.append(request)

    def take_batch(self) -> list[Request]:
        """Return the rows to submit now; they are in flight from now on.

        The canary goes first, then groups of suspects, each without other rows, then rows that wait. A held row is
        tried again when nothing else is left to run.
        """
        here = self._rows_here
        group = next((group for group in self._groups if not here.isdisjoint(group)), None)
        if self.is_busy and (self._is_trial or self._is_canary_in_flight or group or self._awaits_canary(group)):
            return []
        if self._awaits_canary(group):
            assert self.canary is not None
            self._is_canary_in_flight = True
            return [self.canary]
        self._is_trial = bool(group)
        if group:
            batch = self._take_group(group)
        elif self._waiting:
            batch = list(self._waiting)
            self._waiting.clear()
        elif self._held_here and not self.is_busy:
            self._is_trial = True
            row = self._held_here[0]
            del self._held[row]
            batch = self._take_set_aside([row])
        else:
            return []
        self._is_isolated = self._is_trial and len({request.row for request in batch}) == 1
        self.in_flight |= {request.id: request for request in batch}
        return batch

    def finish(self, result: RowResult) -> Request | None:
        """Remove a row that the engine has finished, and return its request; None for the canary's result."""
        request = self._take_in_flight(result)
        if result.error is not None:
            if request is None:  # no witness any more
                self.canary = None
            return request
        self.num_finished += 1
        num_tokens = (result.num_prompt_tokens or 0) + result.num_generated_tokens
        if request is not None and (self.canary is None or num_tokens < self._canary_tokens):
            self._keep_canary(request, num_tokens)
        self._release_held()
        return request

    def take_verdicts(self) -> list[RowResult]:
        """Return the results of rows found to be poison since the last call."""
        verdicts, self._verdicts = self._verdicts, []
        return verdicts

    def record_death(self, error: EngineError) -> None:
        """Return the rows in flight to those that wait, to a group of suspects, or to those held."""
        requests, self.in_flight = self.in_flight, {}
        self._judge_death(_list_rows(requests), EngineDeath.from_error(error))
        suspects = self._held.keys() | {row for group in self._groups for row in group}
        self._set_aside |= {id: request for id, request in requests.items() if id.row in suspects}
        self._waiting.extendleft(request for id, request in reversed(requests.items()) if id.row not in suspects)

    # ---- to the rank's other engines

    def give_up(self) -> list[tuple[Request, int]]:
        """Remove all rows, since the engine is abandoned: no row is blamed for that. Return each with 0 kills."""
        requests = [*self.in_flight.values(), *self._set_aside.values(), *self._waiting]
        self.in_flight.clear()
        self._set_aside.clear()
        self._waiting.clear()
        return [(request, 0) for request in requests]

    def take_unblamed(self) -> list[tuple[Request, int]]:
        """Remove the rows that wait and had no part in a death, and return each with the kills from outside it saw."""
        taken = [request for request in self._waiting if not self._deaths_of_row[request.row]]
        self._waiting = deque(request for request in self._waiting if self._deaths_of_row[request.row])
        return [(request, self._kills_of_row.pop(request.row, 0)) for request in taken]

    def add_kills(self, row: int, num_kills: int) -> None:
        """Count kills from outside that a row saw in another engine of this rank."""
        if num_kills:
            self._kills_of_row[row] += num_kills

    # ---- from one attempt to the next

    def save(self) -> BlameState:
        """Return what the next attempt needs to know."""
        return BlameState(
            _list_rows(self.in_flight),
            self._is_trial,
            self._is_canary_in_flight,
            self.num_finished,
            list(self._groups),
            list(self._held.items()),
            list(self._deaths_of_row.items()),
            list(self._kills_of_row.items()),
            list(self._isolated_kills.items()),
            self._num_canary_deaths,
        )

    def recall(self, state: BlameState) -> None:
        """Continue from what an attempt has saved. Its suspects are tried in their groups as they are added."""
        trial = [state.in_flight] if state.is_trial and state.in_flight else []
        self._groups, self._held = deque([*trial, *state.groups]), dict(state.held)
        self._deaths_of_row, self._kills_of_row = Counter(dict(state.deaths)), Counter(dict(state.kills))
        self._isolated_kills, self._num_canary_deaths = Counter(dict(state.isolated_kills)), state.num_canary_deaths
        self._recalled = frozenset(self._held).union(*self._groups)

    def record_past_death(self, rows: list[int], death: EngineDeath, state: BlameState, *, is_witnessed: bool) -> None:
        """Judge the death that ended an attempt.

        Args:
            rows: all rows that its engines had.
            state: what the rank that tried suspects has saved, and what this tracker continues from.
            is_witnessed: whether the engine had finished a row before.
        """
        self._groups = deque([rest for group in self._groups if (rest := [row for row in group if row not in rows])])
        for row in rows:
            self._held.pop(row, None)
        self._is_trial = state.is_trial and len(rows) == len(state.in_flight)  # no other rank's rows beside them
        self._is_isolated = self._is_trial and len(rows) == 1
        self._is_canary_in_flight = state.is_canary and not rows
        if self._is_isolated and not is_witnessed:
            self._groups.appendleft(rows)
            return
        was_trial, num_groups = self._is_trial, len(self._groups)
        self._judge_death(rows, death)
        if not was_trial and len(self._groups) > num_groups:
            self._split(self._groups.pop())

    # ---- judging

    def _judge_death(self, rows: list[int], death: EngineDeath) -> None:
        """Put the rows of which the engine died among the suspects or the held rows; the others wait."""
        is_canary, self._is_canary_in_flight = self._is_canary_in_flight, False
        if death.is_external_kill and len(rows) == 1:
            self._isolated_kills[rows[0]] += 1
        if death.is_out_of_memory:
            self._put_back(rows)
        elif is_canary:
            self._num_canary_deaths += not death.is_external_kill
        elif self._is_isolated and rows:
            self._judge_isolated(rows[0], death)
        elif self._count_death(rows, death):
            self._split(rows) if self._is_trial else self._suspect(rows)
        else:
            self._put_back(rows)

    def _take_in_flight(self, result: RowResult) -> Request | None:
        if self._is_canary_in_flight:
            self._is_canary_in_flight = False
            return None
        for counter in (self._deaths_of_row, self._kills_of_row, self._isolated_kills):
            del counter[result.row]
        return self.in_flight.pop(result.id)

    def _release_held(self) -> None:
        """Decide on the held rows, since the engine works now.

        If the canary killed the engine meanwhile, they get another trial: the engine was sick then.
        """
        num_canary_deaths, self._num_canary_deaths = self._num_canary_deaths, 0
        for row in self._held_here:
            cause = self._held.pop(row)
            if num_canary_deaths:
                self._groups.append([row])
                continue
            requests = self._take_set_aside([row])
            logger.warning(f"row {row} killed its engine while it ran alone, recording error poison_row")
            message = f"this row killed its engine while it ran alone: {cause}"
            why = RowError("poison_row", message)
            self._verdicts += [RowResult(row, error=why).with_id(request.id) for request in requests]

    @property
    def _held_here(self) -> list[int]:
        here = self._rows_here if self._held else set()
        return [row for row in self._held if row in here]

    @property
    def _rows_here(self) -> set[int]:
        """Rows of the requests that are set aside."""
        return {id.row for id in self._set_aside}

    def _take_set_aside(self, rows: Collection[int]) -> list[Request]:
        """Remove the requests for some rows from those that are set aside, and return them in the order of `rows`."""
        taken = [request for request in self._set_aside.values() if request.row in rows]
        for request in taken:
            del self._set_aside[request.id]
        places = {row: place for place, row in enumerate(rows)}
        return sorted(taken, key=lambda request: places[request.row])

    def _awaits_canary(self, group: list[int] | None) -> bool:
        """Return True if the canary runs next.

        Args:
            group: the next suspects.
        """
        is_needed = bool(self._held_here)
        if self._recalled:  # a row that kills the engine while alone must not be the first that this engine gets
            is_needed |= group is not None and len(group) == 1 and not self.num_finished
            if is_needed and self.canary is None:
                self._take_earlier_canary()
        return is_needed and self.canary is not None

    def _take_earlier_canary(self) -> None:
        self._keep_canary(self.find_canary(), sys.maxsize)  # any row that this engine finishes is a better one
        self.find_canary = _find_none

    def _keep_canary(self, request: Request | None, num_tokens: int) -> None:
        self.canary, self._canary_tokens = request, num_tokens
        if request is not None and request.media is not None:
            request.media.leave_meter()  # rows that wait for memory must not wait for this one

    def _take_group(self, group: list[int]) -> list[Request]:
        """Remove the rows of a group that this rank has, and return their requests."""
        batch = self._take_set_aside(group)
        taken = {request.row for request in batch}
        index = self._groups.index(group)
        if rest := [row for row in group if row not in taken]:
            self._groups[index] = rest
        else:
            del self._groups[index]
        return batch

    def _put_back(self, rows: list[int]) -> None:
        """Return suspects to the front, unblamed."""
        if self._is_trial and rows:
            self._groups.appendleft(rows)

    def _count_death(self, rows: list[int], death: EngineDeath) -> bool:
        """Count a death against its rows, and return True if it blames them."""
        (self._kills_of_row if death.is_external_kill else self._deaths_of_row).update(rows)
        if death.is_external_kill:
            return any(self._kills_of_row[row] >= _SUSPECT_AFTER_KILLS for row in rows)
        return True

    def _suspect(self, rows: list[int]) -> None:
        """Make one group of the rows that were in flight at enough deaths."""
        suspects = [
            row
            for row in rows
            if self._deaths_of_row[row] >= _SUSPECT_AFTER_DEATHS or self._kills_of_row[row] >= _SUSPECT_AFTER_KILLS
        ]
        if suspects:
            self._groups.append(suspects)

    def _split(self, rows: list[int]) -> None:
        """Try halves behind all other groups: a sibling that survives shows that the engine works."""
        middle = (len(rows) + 1) // 2
        self._groups.extend(half for half in (rows[:middle], rows[middle:]) if half)

    def _judge_isolated(self, row: int, death: EngineDeath) -> None:
        """Hold a row that ran alone, unless the engine was killed from outside."""
        if death.is_external_kill and self._isolated_kills[row] < _HELD_AFTER_KILLS:
            self._groups.appendleft([row])  # at once: other rows' trials would only add deaths in a row
            return
        self._held[row] = death.first_line
        if self.canary is None:
            self._take_earlier_canary()
        if self.canary is None:
            held = format_count(len(self._held), "row")
            logger.warning(
                f"row {row} killed its engine while it ran alone, no verdict before the engine has finished "
                f"another row, {held} held"
            )


def judge_notes(notes: Sequence[EngineNote]) -> BlameState:
    """Return what an attempt that was ended by an engine's death knows about rows, from the notes of its ranks.

    The rank that ended first tells what ended the attempt. If that was its engine's death, the rows of all processes of
    the engine count, provided that each of them has left a note: one that was killed has not.

    Args:
        notes: those of one attempt; rank 0's is among them, which tries all suspects.
    """
    tracker = BlameTracker()
    [state] = [note.blame for note in notes if note.rank == 0]
    tracker.recall(state)
    first = min(notes, key=lambda note: note.turn)
    peers = [note for note in notes if note.first_rank == first.first_rank]
    if first.death is not None and len(peers) == first.num_ranks and (death := find_cause(peers)) is not None:
        is_external = any(note.death is not None and note.death.is_external_kill for note in peers)
        tracker.record_past_death(
            [row for note in peers for row in note.blame.in_flight],
            death._replace(is_external_kill=is_external),
            state if first.first_rank == 0 else BlameState(),
            is_witnessed=any(note.blame.num_finished for note in peers),
        )
    if tracker.sickness:
        logger.warning(f"the engine is sick: {tracker.sickness}, so no row is blamed")
        return BlameState()
    return tracker.save()


def _list_rows(ids: Iterable[RequestId]) -> list[int]:
    """Return the rows of some requests, each once, in order."""
    return list(dict.fromkeys(id.row for id in ids))


def _find_none() -> Request | None:
    return None
