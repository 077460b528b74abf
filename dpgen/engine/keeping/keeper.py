"""Keep one rank's loaded engine from one job to the next, for callers that run several jobs with one model.

- A job gets the engine by the same messages as a new one (`dpgen.engine.messages`), and its supervisor treats both the
  same. So everything that guards a run guards these jobs, too: restarts, the agreement on the KV cache, blame.
- An engine that has loaded its model is kept when its job ends, whether that job is complete or not. Rows that are in
  flight then are dropped by the engine; they are generated again when that job is resumed.
- The caller makes sure that the jobs differ in nothing that an engine is started with.
"""

from __future__ import annotations

from collections.abc import Callable

from dpgen.engine.messages import EngineSpec
from dpgen.engine.process import EngineProcess
from dpgen.engine.starting.log_file import EngineLog
from dpgen.engine.supervisor import EngineSupervisor


class EngineKeeper:
    """Start an engine for the first job, and hand it on to the jobs after it."""

    def __init__(self) -> None:
        self._kept: EngineProcess | None = None  # between two jobs
        self._process: EngineProcess | None = None  # the last that was started

    def wrap_start(
        self, start: Callable[[EngineSpec], EngineProcess], log: EngineLog
    ) -> Callable[[EngineSpec], EngineProcess]:
        """Return a function that gives the kept engine another job, once, and starts a new engine after that.

        Args:
            start: starts a process from a spec.
            log: receives the lines of the job's engine.
        """

        def take_or_start(spec: EngineSpec) -> EngineProcess:
            kept, self._kept = self._kept, None
            if kept is not None and kept.is_alive:
                kept.begin_job(spec, log)
                self._process = kept
            else:
                self._process = start(spec)
            return self._process

        return take_or_start

    def take_back(self, engine: EngineSupervisor) -> None:
        """Keep the engine of a job that has ended, or end the engine if it has not loaded its model."""
        process = self._process
        if process is not None and process.is_loaded and process.is_alive and not engine.is_abandoned:
            self._kept = process
        else:
            engine.kill()

    def close(self) -> None:
        """End the kept engine."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()
