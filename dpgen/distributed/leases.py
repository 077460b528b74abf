"""Which ranks live: each counts up a lease in the store for as long as it does, and the others look."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

_RENEW_INTERVAL_S = 2.0
_MAIN_THREAD_TIMEOUT_S = 300.0


class Leases:
    """A counter a rank in the store, counted up by a thread for as long as the rank's process runs.

    A process may run on while its main thread is stuck, in a file system that hangs, say. So a thread that has beaten
    once must go on beating, or the lease is not renewed any more and the others take the rank for lost.

    Args:
        store: answers `add`; the renewing thread asks the other one, `own_store`, so that none waits for the other.
        stuck_s: how long the main thread may be silent between two beats.
    """

    def __init__(
        self,
        store: Any,
        own_store: Any,
        rank: int,
        *,
        interval_s: float = _RENEW_INTERVAL_S,
        stuck_s: float = _MAIN_THREAD_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._rank, self._clock = store, rank, clock
        self._interval_s, self._stuck_s = interval_s, stuck_s
        self._last_heartbeat_s: float | None = None
        self._seen: dict[int, tuple[int, float]] = {}
        self._stopped = threading.Event()
        threading.Thread(target=self._renew, args=(own_store,), name="lease", daemon=True).start()

    def heartbeat(self) -> None:
        """Says that the main thread goes round; from now on it must go on saying so, until `rest`."""
        self._last_heartbeat_s = self._clock()

    def pause_heartbeat(self) -> None:
        """The main thread does now what may take any time."""
        self._last_heartbeat_s = None

    def find_expired(self, members: Sequence[int], limit_s: float) -> list[int]:
        """The members whose counter has stood still for `limit_s` or longer, as far as this rank has watched."""
        now = self._clock()
        found = []
        for member in members:
            count = self._store.add(_key(member), 0)
            before, since_s = self._seen.get(member, (-1, now))
            if count != before:
                self._seen[member] = (count, now)
            elif now - since_s >= limit_s:
                found.append(member)
        return found

    def stop(self) -> None:
        self._stopped.set()

    @property
    def _is_stuck(self) -> bool:
        beaten_s = self._last_heartbeat_s
        return beaten_s is not None and self._clock() - beaten_s > self._stuck_s

    def _renew(self, store: Any) -> None:
        try:
            while not self._stopped.wait(self._interval_s):
                if not self._is_stuck:
                    store.add(_key(self._rank), 1)
        except RuntimeError:
            return  # the store is gone; the main thread meets that itself


def _key(rank: int) -> str:
    return f"dpgen/lease/{rank}"
