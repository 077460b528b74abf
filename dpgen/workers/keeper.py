"""Keep a pool of workers from one job to the next, for callers that run several jobs in a process.

- A job with another specification gets a new pool, and the old one ends. So there is one pool at a time.
- A pool that still has tasks when its job ends, or could not start, is not kept: no answer passes into another job.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

from dpgen.errors import DpgenError
from dpgen.workers.pool import Answer, WorkerPool, WorkerSpec


class WorkerKeeper:
    """Start a pool for the first job, and hand it on to the jobs after it."""

    def __init__(self) -> None:
        self._kept: tuple[WorkerSpec, WorkerPool] | None = None  # between two jobs
        self._log: Callable[[str], None] = lambda line: None

    def take(self, spec: WorkerSpec, log: Callable[[str], None]) -> KeptPool:
        """Return the kept pool if it is of this specification, else a new one.

        Args:
            log: takes each line that the workers print from now on; called in threads.
        """
        self._log = log
        (kept_spec, pool), self._kept = self._kept or (None, None), None
        if pool is not None and kept_spec != spec:
            pool.close()
            pool = None
        return KeptPool(self, spec, pool or WorkerPool(spec, lambda line: self._log(line)))

    def give_back(self, spec: WorkerSpec, pool: WorkerPool) -> None:
        """Keep a pool of which a job has had all answers."""
        self.close()
        self._kept = spec, pool

    def close(self) -> None:
        """End the kept pool."""
        if self._kept is not None:
            self._kept[1].close()
        self._kept = None


class KeptPool:
    """Lend a pool to one job; to close it gives it back."""

    def __init__(self, keeper: WorkerKeeper, spec: WorkerSpec, pool: WorkerPool) -> None:
        self._keeper, self._spec, self._pool = keeper, spec, pool
        self._has_failed = self._is_closed = False

    def submit(self, key: Hashable, task: Any) -> None:
        """Add a task, as `WorkerPool.submit`."""
        self._pool.submit(key, task)

    def poll(self) -> list[Answer]:
        """Return answers, as `WorkerPool.poll`."""
        try:
            return self._pool.poll()
        except DpgenError:
            self._has_failed = True
            raise

    def close(self) -> None:
        """Give the pool back, or end it if it has failed or is busy; safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        with suppress(DpgenError):
            self.poll()  # a worker may have answered meanwhile
        if self._has_failed or self._pool.num_pending:
            self._pool.close()
        else:
            self._keeper.give_back(self._spec, self._pool)
