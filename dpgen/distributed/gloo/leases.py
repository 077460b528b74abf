"""Track which ranks are alive: each rank increments a counter in the store, and others watch the counters."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpgen.errors import EXIT_RESUMABLE, ConfigError
from dpgen.log import flush_logging

logger = logging.getLogger(__name__)

_MIN_LEASE_S = 8.0  # a quarter of it is still as long as a renewal takes
_LOOKS_PER_LIMIT = 12
_EXIT_WAIT_S = 10.0


@dataclass(frozen=True)
class LeaseTiming:
    """Hold how often leases are renewed and how long they last.

    Attributes:
        lease_s: a rank is lost if it has not renewed its lease for this long, the store if it gives no answer.
        interval_s: between two renewals.
    """

    lease_s: float = 60.0
    interval_s: float = 2.0

    @property
    def broken_lease_s(self) -> float:
        """How long a lease lasts once the group is known to be broken, in seconds."""
        return self.lease_s / 4

    @property
    def stuck_s(self) -> float:
        """How long a main thread may take between two heartbeats, in seconds: 300 by default."""
        return 5 * self.lease_s

    @property
    def slow_s(self) -> float:
        """The same in a slow phase, whose single steps (a library's) take long: 7,200 s by default."""
        return 24 * self.stuck_s


def read_lease_timing(environ: Mapping[str, str]) -> LeaseTiming:
    """Return the timing. DPGEN_LEASE_S is for tests, which would otherwise wait a minute each.

    On a busy machine or network a short lease takes slow ranks for lost.

    Raises:
        ConfigError: DPGEN_LEASE_S is no number, or so short that healthy ranks would count as lost.
    """
    text = environ.get("DPGEN_LEASE_S") or "60"
    try:
        lease_s = float(text)
    except ValueError:
        lease_s = 0.0
    if not _MIN_LEASE_S <= lease_s < math.inf:
        raise ConfigError(f"DPGEN_LEASE_S={text}: must be a number of seconds, at least {_MIN_LEASE_S:.0f}")
    return LeaseTiming(lease_s)


class Leases:
    """Renew this rank's lease from a thread while its process runs, and watch the leases of other ranks.

    A process may run on while its main thread is stuck, for example in a file system that hangs. So once the main
    thread has entered a phase, it must call `heartbeat` again and again. Otherwise the lease is not renewed, and the
    rank counts as lost. Once the other ranks have noticed, the rank ends itself: it would hold its job, and what it
    generates is discarded.

    Args:
        store: used by the caller's thread.
        own_store: the same store over another connection, for the renewing thread, so that neither waits for the other.
        end_process: ends this process if its main thread stays stuck; called by the renewing thread.
    """

    def __init__(
        self,
        store: Any,
        own_store: Any,
        rank: int,
        *,
        timing: LeaseTiming,
        end_process: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._rank, self._clock = store, rank, clock
        self._timing, self._end_process = timing, end_process
        self._last_heartbeat_s: float | None = None
        self._limit_s = timing.stuck_s
        self._last_changes: dict[int, tuple[int, float]] = {}  # rank → its counter, and when this rank first saw it
        self._stopped = threading.Event()
        self._last_look: tuple[tuple[Sequence[int], float], float] | None = None  # of whom by which limit, and when
        store.add(_lease_key(rank), 0)  # others may ask for it from now on
        threading.Thread(target=self._renew, args=(own_store,), name="lease", daemon=True).start()

    def create_for(self, members: Iterable[int]) -> None:
        """Create the leases of these ranks: one that dies before it has created its own must be seen to expire."""
        # A member that has renewed its lease by now has a lower counter then, which is as new as a higher one.
        self._store.set_many(dict.fromkeys(map(_lease_key, members), "0"))

    def enter_phase(self, *, is_slow: bool = False) -> None:
        """Expect heartbeats from now on; see `RankGroup.enter_phase`."""
        self.heartbeat()
        self._limit_s = self._timing.slow_s if is_slow else self._timing.stuck_s

    def heartbeat(self) -> None:
        """Report that the main thread makes progress, or waits for other ranks, which is no fault of its own."""
        self._last_heartbeat_s = self._clock()

    def find_expired(self, members: Sequence[int], limit_s: float) -> list[int]:
        """Return the members whose counter has not changed for `limit_s`, as far as this rank has watched.

        All counters are one request to the store. Between two requests, a twelfth of the limit apart (5 s of 60), no
        member is new to have expired.

        Args:
            members: ranks whose `Leases` exist.
        """
        now, watched = self._clock(), (tuple(members), limit_s)
        if self._last_look and self._last_look[0] == watched and now - self._last_look[1] < limit_s / _LOOKS_PER_LIMIT:
            return []
        self._last_look = (watched, now)
        expired = []
        counts = self._store.get_many([_lease_key(member) for member in members])
        for member, count in zip(members, counts, strict=True):
            last_count, since_s = self._last_changes.get(member, (-1, now))
            if count != last_count:
                self._last_changes[member] = (count, now)
            elif now - since_s >= limit_s:
                expired.append(member)
        return expired

    def stop(self) -> None:
        """Stop renewing this rank's lease."""
        self._stopped.set()

    def _renew(self, store: Any) -> None:
        timing, is_lost = self._timing, False
        while not self._stopped.wait(timing.interval_s):
            last_s = self._last_heartbeat_s
            silent_s = 0.0 if last_s is None else self._clock() - last_s
            if silent_s > self._limit_s + 2 * timing.lease_s:
                self._end_process()
                return
            if silent_s <= self._limit_s and not is_lost:
                try:
                    store.add(_lease_key(self._rank), 1)
                except RuntimeError:  # the store is gone: the main thread will notice, unless it is stuck
                    is_lost = True


def end_stuck_process(
    before_exit: Callable[[], None],
    why: str = "the main thread is stuck and the other ranks continue without this one",
) -> None:
    """End this process, resumable, though its main thread is stuck.

    Args:
        before_exit: called first, in a thread that is not waited for long: the file system may be what is stuck.
        why: for the log.
    """
    logger.error(f"{why}, ending this process")
    thread = threading.Thread(target=before_exit, name="before-exit", daemon=True)
    thread.start()
    thread.join(_EXIT_WAIT_S)
    flush_logging()
    os._exit(EXIT_RESUMABLE)


def _lease_key(rank: int) -> str:
    return f"dpgen/lease/{rank}"
