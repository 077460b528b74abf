"""Decide how many engines a rank runs while it generates, and whether another one pays. No process, only numbers.

- With `auto` the first engine is measured; where few rows are left, it stays the only one.
- Later another one may use memory that was left for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dpgen.engine.messages import EngineSpec, EngineStats
from dpgen.engine.pool.engine_count import (
    DEFAULT_NUM_SEQS,
    Calibration,
    EngineCount,
    KvWatch,
    Signals,
    decide_engine_count,
    fills_another,
    pays,
)
from dpgen.engine.pool.router import RequestRouter

TOO_FEW_ROWS = "too few rows are left for another to pay"
_MIN_START_S = 5.0  # of an engine that joins; the first one's loading tells more


class EngineGrowth:
    """Hold how many engines there are to be.

    Args:
        count: how many there are to be, or at most.
        spec: of each engine; its number of engines is the most that there may be.
        router: knows how many sequences a row has.
        clock: seconds that only increase.

    Attributes:
        count: how many engines there are to be, and why.
        on_decided: called with the number once it is known; again where fewer engines start after all.
        max_engines: for how many the rank's memory is divided: while fewer run, the rest of it is idle.
        start_s: that an engine takes to start.
        get_rows_left: returns how many rows this rank still has to generate, about: its part of the run's.
    """

    def __init__(self, count: EngineCount, spec: EngineSpec, router: RequestRouter, clock: Callable[[], float]) -> None:
        self.count, self._router, self._clock = count, router, clock
        self.on_decided: Callable[[EngineCount], None] = lambda count: None
        self.get_rows_left: Callable[[], float] = lambda: float("inf")
        self._calibration: Calibration | None = None
        self._kv_watch: KvWatch | None = None
        self.max_engines, self._was_auto = spec.num_engines, count.is_auto
        self._is_decided = False
        self._begin_s: float | None = None  # when the first rows came
        self._rows_left, self._num_finished = 0.0, 0.0  # when last looked at, and what they have lost since the begin
        self.start_s, self._num_seqs = _MIN_START_S, spec.options.get("max_num_seqs") or DEFAULT_NUM_SEQS

    def limit(self, num_engines: int) -> None:
        """Note for how many engines the rank's memory is divided: it may have room for fewer than there were to be."""
        self.max_engines = num_engines
        if num_engines < self.count.number:
            why = f"{self.count.why}; the memory that is known to be free has room for {num_engines}"
            self.count = EngineCount(num_engines, why, self.count.is_auto and num_engines > 1)

    def begin_measuring(self, max_num_seqs: int, start_s: float) -> None:
        """Note that the first engine is loaded.

        Args:
            max_num_seqs: sequences that it runs at a time.
            start_s: that it took to load.
        """
        self._num_seqs, self.start_s = max_num_seqs, max(_MIN_START_S, start_s)
        self._kv_watch = KvWatch(max_num_seqs)
        if self.count.is_auto:
            self._calibration = Calibration(max_num_seqs, self.count.number)

    def begin(self) -> None:
        """Note that rows have come."""
        if self._begin_s is None:
            self._begin_s, self._rows_left = self._clock(), self.get_rows_left()

    def measure(self, stats: EngineStats) -> None:
        """Take the first engine's newest statistics, and note how many engines pay once they tell."""
        found = None if self._calibration is None else self._calibration.add(stats, self._clock())
        if found is None:
            return
        self._calibration = None
        if isinstance(found, Signals):
            self.count = decide_engine_count(found, self.count.number)
        else:
            self.count = EngineCount(1, found)

    def decide(self) -> bool:
        """Return True once it is known how many engines there are to be; the first time this is told."""
        if self._is_decided:
            return True
        if self.count.is_auto:
            if fills_another(self._count_rows_left(), self._rows_at_once):
                return False
            self.count = EngineCount(1, f"{self.count.why}; {TOO_FEW_ROWS}")
        self._is_decided, self._calibration = True, None
        if self.count.number > 1 and not self.allows_another():
            self.correct(1, TOO_FEW_ROWS)
        else:
            self.on_decided(self.count)
        return True

    def allows_another(self) -> bool:
        """Return False if another engine would not pay, and no number was given."""
        return not self._was_auto or self._pays()

    def correct(self, number: int, why: str) -> None:
        """Change how many engines there are to be, or at most, and tell it if that was known.

        Args:
            why: as the end of a sentence.
        """
        is_auto = self.count.is_auto and number > 1
        self.count = dataclasses.replace(self.count, number=number, why=f"{self.count.why}; {why}", is_auto=is_auto)
        if self._is_decided:
            self.on_decided(self.count)

    def use_idle_memory(self, stats: EngineStats, num_engines: int) -> bool:
        """Return True if another engine is to join, since the KV caches are full, and it has its own.

        Args:
            stats: of one of the engines, once all have joined.
            num_engines: that have been started, those included that did not start.
        """
        if self._kv_watch is None or not self._kv_watch.is_short(stats):
            return False
        if num_engines >= self.max_engines or not self._pays():
            return False
        self.correct(self.count.number + 1, "later the KV cache was full")
        return True

    def _pays(self) -> bool:
        rows_left = self._count_rows_left()
        generating_s = 0.0 if self._begin_s is None else self._clock() - self._begin_s
        rate = self._num_finished / generating_s if generating_s > 0 else 0.0
        return pays(rows_left, rate, self.start_s, self._rows_at_once)

    def _count_rows_left(self) -> float:
        """Return the rows that are left, and count those that are finished: by all ranks, since these help each other.

        Once a rank is lost, the others have more left than before, and have lost none for that.
        """
        rows_left = self.get_rows_left()
        if self._begin_s is not None:
            self._num_finished += max(0.0, self._rows_left - rows_left)
            self._rows_left = rows_left
        return rows_left

    @property
    def _rows_at_once(self) -> float:
        """Rows that an engine runs at a time."""
        return self._num_seqs / self._router.seqs_per_row
