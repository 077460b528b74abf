"""Workers that serve one job after the other: kept where nothing differs, and never with another job's tasks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpgen.workers.keeper import KeptPool, WorkerKeeper
from dpgen.workers.pool import WorkerRefused, WorkerSpec

SPEC = WorkerSpec("the test", "helpers.worker_tasks:start", (), dict(os.environ), timeout_s=60)


@pytest.fixture
def keeper() -> Iterator[WorkerKeeper]:
    keeper = WorkerKeeper()
    yield keeper
    keeper.close()


@pytest.fixture(autouse=True)
def import_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPEC.environment, "PYTHONPATH", str(Path(__file__).parents[1]))  # type: ignore[arg-type]


def begin(keeper: WorkerKeeper, spec: WorkerSpec = SPEC) -> KeptPool:
    return keeper.take(spec, lambda line: None)


def ask(pool: KeptPool, task: str = "pid") -> Any:
    pool.submit(0, task)
    while not (answers := pool.poll()):
        time.sleep(0.005)
    return answers[0].value


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_workers_go_on_to_the_next_job_unless_it_differs_and_end_with_the_keeper(keeper: WorkerKeeper) -> None:
    pids = []
    for spec in (SPEC, SPEC, replace(SPEC, arguments=("another",)), SPEC):
        pool = begin(keeper, spec)
        pids.append(ask(pool))
        pool.close()
        pool.close()
    assert pids[0] == pids[1] and len(set(pids)) == 3
    assert [is_alive(pid) for pid in pids] == [False, False, False, True]
    keeper.close()
    assert not is_alive(pids[-1])


def test_a_busy_worker_ends_with_its_job_so_that_no_answer_reaches_another(keeper: WorkerKeeper) -> None:
    pool = begin(keeper)
    pid = ask(pool)
    pool.submit(0, "hang")
    pool.poll()
    pool.close()
    assert not is_alive(pid)
    assert ask(begin(keeper)) != pid


def test_a_worker_that_was_killed_between_two_jobs_is_replaced(keeper: WorkerKeeper) -> None:
    pool = begin(keeper)
    pid = ask(pool)
    pool.close()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ask(begin(keeper), "fine") == "fine"


def test_workers_that_could_not_start_are_not_kept(keeper: WorkerKeeper) -> None:
    spec = replace(SPEC, arguments=("refuse",))
    for _ in range(2):
        pool = begin(keeper, spec)
        with pytest.raises(WorkerRefused, match="no such"):
            ask(pool)
        pool.close()
