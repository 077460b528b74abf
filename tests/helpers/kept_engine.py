"""Run jobs on real vLLM one after the other, with one loaded engine: to start one takes most of a short job's time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpgen.api.jobs import RankJob
from dpgen.api.processes import RankProcesses
from dpgen.config.loader import load_from_args
from helpers.jobs import JOB_ENVIRONMENT, REPO, Launcher, descendants

# What an engine is started with.
_ENGINE_SECTIONS = ("model", "task", "engine", "lora", "parallel")


class KeptEngine:
    """Run command lines of `dpgen run` as a `dpgen.Session` runs its jobs: in a rank process that keeps its engine.

    A job with another model or other engine options gets a new rank process.
    """

    def __init__(self) -> None:
        self._ranks: RankProcesses | None = None
        self._started_with: list[Any] = []

    def run(self, *arguments: str) -> None:
        """Run `dpgen run ARGUMENTS` on one rank; fail the test with the error if it fails."""
        with contextlib.chdir(REPO):
            job = RankJob(load_from_args(arguments), "", "rank0")
        config = job.config
        wanted = [getattr(config, name) for name in _ENGINE_SECTIONS]
        if self._ranks is None or not self._ranks.is_alive or wanted != self._started_with:
            self.close()
            with mock.patch.dict(os.environ, JOB_ENVIRONMENT), _use_slots_core():
                self._ranks = RankProcesses(None, is_quiet=False)
            self._started_with = wanted
        _move_ranks_to_slots_core()
        self._ranks.submit(job)
        outcome = self._ranks.wait()
        if outcome.error_type is not None:
            pytest.fail(f"dpgen run {' '.join(arguments)}: {outcome.error_type}: {' '.join(outcome.messages)}")

    def run_rows(
        self, run_dir: Path, rows: Sequence[Mapping[str, Any]], model: Path, engine: Mapping[str, Any], *arguments: str
    ) -> Path:
        """Run `dpgen run ARGUMENTS` over these rows, with this model and engine; return the run directory."""
        data = run_dir.with_suffix(".jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = [f"engine.{name}={json.dumps(value)}" for name, value in engine.items()]
        paths = [f"run.dir={run_dir}", f"model={model}", f"data.path={data}"]
        self.run(*paths, *options, *arguments)
        return run_dir

    def close(self) -> None:
        """End the rank process and its engine."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None


@contextlib.contextmanager
def _use_slots_core() -> Iterator[None]:
    """Let this thread, and so the processes that it starts, run on the core of the test's engine slot."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, Launcher.choose_cores())
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _move_ranks_to_slots_core() -> None:
    """Move the rank and its engine to the core of the test's engine slot, which may not be that of the test before."""
    for name in (b"dpgen.api.worker", b"dpgen.engine.server"):
        for pid in descendants(os.getpid(), name):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), Launcher.choose_cores())
