"""The generation loop: admit, collect, agree, until no rank has unfinished work.

Nothing in it waits while the engine could work: the engine always holds a few more rows than it runs, rendering
happens between its messages, the journal syncs beside it, and the ranks' agreement is an asynchronous all-reduce.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from dpgen.collectives import Group, Pending
from dpgen.engine.protocol import Event, Finished, Stats
from dpgen.errors import DpgenError, PeerFailed
from dpgen.feed import Feed
from dpgen.records import Request, RowError, RowResult

_AGREE_INTERVAL_S = 1.0
_WAIT_S = 0.1  # the longest sleep while the engine is at work
_IDLE_WAIT_S = 0.01  # ... while this rank has nothing left and waits for the others


class Engine(Protocol):
    """What the loop needs of an engine."""

    def submit(self, requests: list[Request]) -> None: ...

    def poll(self, timeout_s: float) -> list[Event]: ...


class ResultLog(Protocol):
    """What the loop needs of a journal."""

    def append(self, result: RowResult) -> None: ...

    def tick(self) -> None: ...


@dataclass
class Totals:
    """What the unfinished-work all-reduce sums: of one rank, or of all."""

    num_unfinished_ranks: int = 0
    num_rows: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0

    def as_list(self) -> list[int]:
        return [getattr(self, each.name) for each in fields(self)]

    @staticmethod
    def from_list(values: Sequence[int]) -> Totals:
        return Totals(*values)


class Generation:
    """One rank's part of the run; `run` returns when every rank is through.

    Args:
        feed: this rank's rows.
        engine: a loaded engine.
        max_in_flight: rows that the engine holds at a time: what it runs, and a reserve.
        journal: takes every result.
        group: the ranks.
        max_leading_errors: stop if the first so many rows of the run are all errors; 0 never stops.
        show: takes the totals of all ranks, about once a second.
    """

    def __init__(
        self,
        feed: Feed,
        engine: Engine,
        journal: ResultLog,
        group: Group,
        *,
        max_in_flight: int,
        max_leading_errors: int = 0,
        show: Callable[[Totals], None] = lambda totals: None,
    ) -> None:
        self._feed, self._engine, self._journal, self._group = feed, engine, journal, group
        self._max_in_flight, self._max_leading_errors, self._show = max_in_flight, max_leading_errors, show
        self._in_flight: set[int] = set()
        self._mine = Totals()
        self._num_kept_tokens = 0
        self._first_error: tuple[int, RowError] | None = None
        self._agreement: Pending | None = None
        self._next_agreement_s = 0.0
        self._all: Totals | None = None

    def run(self) -> Totals:
        """Generates until no rank has unfinished work; the totals of all ranks."""
        while self._all is None or self._all.num_unfinished_ranks > 0:
            self._admit()
            self._collect()
            self._agree()
            self._journal.tick()
        return self._all

    @property
    def _has_work(self) -> bool:
        return bool(self._in_flight) or not self._feed.is_empty

    def _admit(self) -> None:
        """Fills the engine up to its limit."""
        requests = []
        while len(self._in_flight) < self._max_in_flight:
            row = self._feed.take()
            if row is None:
                break
            if isinstance(row, RowResult):
                self._keep(row)
                continue
            self._in_flight.add(row.row)
            requests.append(row)
        if requests:
            self._engine.submit(requests)

    def _collect(self) -> None:
        """Takes what the engine has finished; renders ahead while there is nothing to take."""
        events = self._engine.poll(0)
        if not events and self._feed.num_ready < self._max_in_flight and self._feed.prepare():
            return
        for event in events or self._engine.poll(_WAIT_S if self._has_work else _IDLE_WAIT_S):
            if isinstance(event, Finished):
                for result in event.results:
                    self._in_flight.remove(result.row)
                    self._keep(result)
            elif isinstance(event, Stats):
                self._mine.num_generated_tokens = max(event.num_generated_tokens, self._num_kept_tokens)

    def _keep(self, result: RowResult) -> None:
        self._journal.append(result)
        self._mine.num_rows += 1
        self._mine.num_prompt_tokens += result.num_prompt_tokens or 0
        self._num_kept_tokens += result.num_generated_tokens
        self._mine.num_generated_tokens = max(self._mine.num_generated_tokens, self._num_kept_tokens)
        if result.error is not None:
            self._mine.num_errors += 1
            self._first_error = self._first_error or (result.row, result.error)

    def _agree(self) -> None:
        """The unfinished-work all-reduce: termination, progress and the errors' limit in one collective."""
        now = time.monotonic()
        if self._agreement is None:
            # A rank that is through asks at once, again and again; so the last rank's word ends the run at once.
            if self._has_work and now < self._next_agreement_s:
                return
            self._next_agreement_s = now + _AGREE_INTERVAL_S
            self._mine.num_unfinished_ranks = int(self._has_work)
            self._agreement = self._group.reduce(self._mine.as_list(), "sum")
        if self._agreement.done():
            self._all = Totals.from_list(self._agreement.result())
            self._agreement = None
            self._show(self._all)
            self._stop_if_all_fail(self._all)

    def _stop_if_all_fail(self, totals: Totals) -> None:
        """Ends the run, on all ranks alike, if everything so far is an error."""
        if not 0 < self._max_leading_errors <= totals.num_errors == totals.num_rows:
            return
        told = f"the first {totals.num_rows} rows all failed"
        if self._first_error is None:
            raise PeerFailed(told)  # a rank that has seen an error shows it
        row, error = self._first_error
        raise DpgenError(
            f"{told}, so the fault is likely in the configuration; row {row}: {error.type}: {error.message} "
            "(run.max_leading_errors=0 goes on regardless)"
        )
