"""Keep one rank's loaded engines from one job to the next, for callers that run several jobs with one model.

- A rank that runs one job has a keeper too, for the engine that is started before that job begins (`early_start`).
- A job gets the engine by the same messages as a new one (`dpgen.engine.messages`), and its supervisor treats both the
  same. So everything that guards a run guards these jobs, too: restarts, the agreement on the KV cache, blame.
- An engine that has loaded its model is kept when its job ends, whether that job is complete or not. Rows that are in
  flight then are dropped by the engine; they are generated again when that job is resumed.
- The caller makes sure that the jobs differ in nothing that an engine is started with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from dpgen.config.schema import Config
from dpgen.distributed.topology import Topology
from dpgen.engine.keeping.early_start import EarlyStart
from dpgen.engine.messages import EngineSpec
from dpgen.engine.pool.engine_count import EngineCount
from dpgen.engine.pool.engine_pool import EnginePool
from dpgen.engine.pool.growth import TOO_FEW_ROWS
from dpgen.engine.process import EngineProcess
from dpgen.engine.starting.log_file import EngineLog
from dpgen.workers.keeper import WorkerKeeper


class StartProcess(Protocol):
    """Start a process for the engine of a number."""

    def __call__(self, spec: EngineSpec, index: int = 0) -> EngineProcess: ...


class EngineKeeper:
    """Start engines for the first job, and hand them on to the jobs after it.

    Args:
        has_one_job: end the engines with the job.

    Attributes:
        early: the next job's first engine, which imports vLLM before that job begins.
        count: how many engines the last job found to pay; None before one has.
        max_engines: for how many that job has divided the rank's memory.
        start_s: seconds that an engine takes to start; 0 before one has.
    """

    def __init__(self, *, has_one_job: bool = False) -> None:
        self.has_one_job, self.early = has_one_job, EarlyStart()
        self.count: EngineCount | None = None
        self.max_engines, self.start_s = 1, 0.0
        self._kept: dict[int, EngineProcess] = {}  # between two jobs, by the engines' numbers
        self._processes: dict[int, EngineProcess] = {}  # the last of each engine that was started

    def begin_early(self, config: Config, topology: Topology) -> None:
        """Start the process of the next job's first engine, unless one is kept."""
        if 0 not in self._kept:
            self.early.begin(config, topology)

    def wrap_start(self, start: StartProcess, log: EngineLog) -> Callable[..., EngineProcess]:
        """Return a function that gives each kept engine another job, once, and starts a new engine after that.

        Args:
            start: starts a process from a spec, for an engine of a number.
            log: receives the lines of the job's first engine; others have files beside it.
        """

        def take_or_start(spec: EngineSpec, index: int = 0) -> EngineProcess:
            kept = self._kept.pop(index, None)
            if kept is not None and kept.is_alive:
                kept.begin_job(spec, log.get_sibling(index))
                self._processes[index] = kept
            else:
                self._processes[index] = start(spec, index)
            return self._processes[index]

        return take_or_start

    def take_back(self, pool: EnginePool) -> None:
        """Keep the engines of a job that has ended; those that have not loaded their model are ended."""
        if self.has_one_job:
            pool.kill()
            return
        count = pool.growth.count
        is_measured = bool(count.facts) and not count.why.endswith(TOO_FEW_ROWS)
        self.count = count if is_measured else None  # a job with few rows says nothing about the next one
        self.max_engines, self.start_s = pool.growth.max_engines, pool.growth.start_s
        for index, engine in enumerate(pool.supervisors):
            process = self._processes.get(index)
            if process is not None and process.is_loaded and process.is_alive and not engine.is_abandoned:
                self._kept[index] = process
            else:
                engine.kill()

    def close(self) -> None:
        """End the kept engines."""
        self.early.end()
        kept, self._kept = self._kept, {}
        for process in kept.values():
            process.stop()
        for process in kept.values():
            process.close()


@dataclass(frozen=True)
class Keepers:
    """Hold what keeps processes from one job of a rank process to the next. By default all end with their job.

    Attributes:
        media_workers: those that prepare media; None to end them with their job.
    """

    engines: EngineKeeper = field(default_factory=lambda: EngineKeeper(has_one_job=True))
    media_workers: WorkerKeeper | None = None
