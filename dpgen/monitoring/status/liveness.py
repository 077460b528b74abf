"""Decide from any host whether the writer of a record still lives.

- On the writer's own host its process id answers at once.
- Elsewhere a record that is written again is a live rank's. One that stays the same for several of its own intervals,
  by the clock of the reader, is a dead one's. Until then the answer is open: clocks of two hosts, and the times of a
  file server, are never compared with each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dpgen.monitoring.status.record import RankRecord, read_machine, read_process

Verdict = Literal["live", "dead", "checking"]

_PATIENCE_INTERVALS = 3  # a rank that is written twice in that time lives, however late a write is
_PATIENCE_S = 4.0  # beyond; caches of network file systems keep what a reader saw for about 3 s


@dataclass
class _Sighting:
    sequence: int
    seen_s: float
    has_changed: bool = False


class LivenessJudge:
    """Judge the same run's records again and again, as they are read.

    Args:
        clock: monotonic seconds.
        machine: this host's `read_machine`.
        find_process: returns what `read_process` does.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        machine: str | None = None,
        find_process: Callable[[int], tuple[int, str] | None] = read_process,
    ) -> None:
        self._clock, self._find_process = clock, find_process
        self._machine = read_machine() if machine is None else machine
        self._sightings: dict[tuple[object, ...], _Sighting] = {}

    def judge(self, record: RankRecord) -> Verdict:
        """Return whether the rank that wrote a record with state "live" does live."""
        process = record.process
        if process.machine and process.machine == self._machine:
            return "live" if self._is_running(record) else "dead"
        key = (record.path_name, record.attempt, process)
        now_s = self._clock()
        sighting = self._sightings.setdefault(key, _Sighting(record.sequence, now_s))
        if record.sequence != sighting.sequence:
            sighting.sequence, sighting.seen_s, sighting.has_changed = record.sequence, now_s, True
        if now_s - sighting.seen_s > _PATIENCE_INTERVALS * record.interval_s + _PATIENCE_S:
            return "dead"
        return "live" if sighting.has_changed else "checking"

    def _is_running(self, record: RankRecord) -> bool:
        found = self._find_process(record.process.pid)
        return found is not None and found[0] == record.process.process_start and found[1] not in "ZX"
