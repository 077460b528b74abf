"""Track which ranks are alive: each rank increments a counter in the store, and others watch the counters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

_RENEW_INTERVAL_S = 2.0
_MAIN_THREAD_TIMEOUT_S = 300.0


class Leases:
    """Renew this rank's lease from a thread while its process runs, and watch the leases of other ranks.

    A process may run on while its main thread is stuck, for example in a file system that hangs. So once the main
    thread has called `heartbeat`, it must keep calling; otherwise the lease is not renewed and the rank counts as lost.

    Args:
        store: has `add`; used by the caller's thread.
        own_store: the same store over another connection, for the renewing thread, so that neither waits for the other.
        stuck_s: how long the main thread may take between two heartbeats.
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
        self._last_changes: dict[int, tuple[int, float]] = {}  # rank → its counter, and when this rank first saw it
        self._stopped = threading.Event()
        threading.Thread(target=self._renew, args=(own_store,), name="lease", daemon=True).start()

    def heartbeat(self) -> None:
        """Report that the main thread is running; see `RankGroup.heartbeat`."""
        self._last_heartbeat_s = self._clock()

    def pause_heartbeat(self) -> None:
        """Expect no heartbeat until the next one."""
        self._last_heartbeat_s = None

    def find_expired(self, members: Sequence[int], limit_s: float) -> list[int]:
        """Return the members whose counter has not changed for `limit_s`, as far as this rank has watched."""
        now = self._clock()
        expired = []
        for member in members:
            count = self._store.add(_lease_key(member), 0)
            last_count, since_s = self._last_changes.get(member, (-1, now))
            if count != last_count:
                self._last_changes[member] = (count, now)
            elif now - since_s >= limit_s:
                expired.append(member)
        return expired

    def stop(self) -> None:
        """Stop renewing this rank's lease."""
        self._stopped.set()

    @property
    def _is_stuck(self) -> bool:
        last_s = self._last_heartbeat_s
        return last_s is not None and self._clock() - last_s > self._stuck_s

    def _renew(self, store: Any) -> None:
        try:
            while not self._stopped.wait(self._interval_s):
                if not self._is_stuck:
                    store.add(_lease_key(self._rank), 1)
        except RuntimeError:
            return  # the store is gone; the main thread will notice


def _lease_key(rank: int) -> str:
    return f"dpgen/lease/{rank}"
