"""Test that a pool of worker processes answers every task, whatever becomes of its workers."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import wait_for

from dpgen.errors import DpgenError
from dpgen.workers.pool import Answer, WorkerPool, WorkerRefused, WorkerSpec

MakePool = Callable[..., WorkerPool]


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    pools: list[WorkerPool] = []

    def make(*arguments: Any, **fields: Any) -> WorkerPool:
        tests = str(Path(__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
        clock = fields.pop("clock", None)
        spec = WorkerSpec("the helper", "helpers.worker_tasks:start", arguments, environment, **fields)
        pools.append(WorkerPool(spec, lambda line: None, **({} if clock is None else {"clock": clock})))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def wait_ready(pool: WorkerPool) -> Any:
    return pool.wait_until_ready(lambda: None)


def collect(pool: WorkerPool, num_answers: int) -> dict[Any, Answer]:
    answers: list[Answer] = []

    def has_all() -> bool:
        answers.extend(pool.poll())
        return len(answers) >= num_answers

    wait_for(has_all)
    assert pool.num_pending == 0 and pool.pending_keys == []
    return {answer.key: answer for answer in answers}


def test_each_task_is_answered_under_its_key(make_pool: MakePool) -> None:
    pool = make_pool("x", num_workers=2)
    assert wait_ready(pool)["arguments"] == ("x",)
    for key in range(20):
        pool.submit(key, "a" * key * 20_000)  # more than a pipe holds
    assert sorted(pool.pending_keys) == list(range(20))
    answers = collect(pool, 20)
    assert {key: len(answer.value) for key, answer in answers.items()} == {key: key * 20_000 for key in range(20)}


def test_a_task_that_raises_costs_itself_alone(make_pool: MakePool) -> None:
    pool = make_pool()
    wait_ready(pool)
    for key, task in enumerate(["a", "raise", "b"]):
        pool.submit(key, task)
    answers = collect(pool, 3)
    assert answers[1] == Answer(1, failure="KeyError: 'row\\n7'")
    assert [answers[0].value, answers[2].value] == ["a", "b"]


def test_a_worker_that_dies_costs_its_task_and_is_replaced(make_pool: MakePool) -> None:
    pool = make_pool()
    wait_ready(pool)
    for key, task in enumerate(["pid", "die", "pid"]):
        pool.submit(key, task)
    answers = collect(pool, 3)
    assert answers[1].failure == "the helper process died (exit status -9)"
    assert answers[0].value != answers[2].value


def test_a_worker_has_tasks_ahead_but_no_more_than_its_pipe_holds(make_pool: MakePool) -> None:
    pool = make_pool()
    wait_ready(pool)
    for key in range(20):
        pool.submit(key, "hang" if key == 0 else "a")
    assert pool.poll() == []
    assert len(pool._workers[0].tasks) == 8
    pool = make_pool(max_ahead=2)
    wait_ready(pool)
    for key in range(4):
        pool.submit(key, "hang")
    assert pool.poll() == []
    assert len(pool._workers[0].tasks) == 2
    pool = make_pool()
    wait_ready(pool)
    for key, size in enumerate([40_000, 20_000, 20_000]):
        pool.submit(key, "hang" if key == 0 else "a" * size)
    assert pool.poll() == []
    assert len(pool._workers[0].tasks) == 3, "the first task is small"
    pool.submit(3, "a" * 200_000)
    assert pool.poll() == []
    assert len(pool._workers[0].tasks) == 3, "a pipe holds no more, and the rank must not wait for it"


def test_tasks_ahead_of_a_death_or_a_hang_are_done_by_the_successor(make_pool: MakePool) -> None:
    pool = make_pool(timeout_s=1.0)
    wait_ready(pool)
    for key, task in enumerate(["a", "die", "b", "hang", "c", "d"]):
        pool.submit(key, task)
    answers = collect(pool, 6)
    assert {key: answer.value for key, answer in answers.items() if answer.failure is None} == {
        0: "a",
        2: "b",
        4: "c",
        5: "d",
    }
    assert answers[1].failure == "the helper process died (exit status -9)"
    assert (answers[1].signal, answers[1].has_timed_out) == (9, False), "as the kernel kills when memory runs out"
    assert answers[3].failure == "the helper took longer than 1 s"
    assert (answers[3].signal, answers[3].has_timed_out) == (None, True)


def test_a_worker_that_dies_idle_costs_no_task(make_pool: MakePool) -> None:
    pool = make_pool()
    pid = wait_ready(pool)["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pool.poll() == [] and not Path(f"/proc/{pid}").exists())  # reaped, hence noticed
    pool.submit("a", "task")
    assert collect(pool, 1)["a"].value == "task"


def test_a_task_that_takes_too_long_is_given_up(make_pool: MakePool) -> None:
    now_s = 0.0
    pool = make_pool(timeout_s=60.0, clock=lambda: now_s)
    wait_ready(pool)
    pool.submit("slow", "hang")
    pool.submit("next", "task")
    assert pool.poll() == []
    now_s = 60.0
    assert pool.poll() == []
    now_s = 61.0
    answers = {answer.key: answer for answer in pool.poll()}
    assert answers["slow"].failure == "the helper took longer than 60 s"
    assert collect(pool, 1)["next"].value == "task"


@pytest.mark.parametrize(
    ("argument", "kind", "message"),
    [
        ("refuse", WorkerRefused, "the helper can't start: ValueError: no such parser"),
        ("die", DpgenError, "the helper process died (exit status 3) while it was starting, 3 times in a row"),
    ],
)
def test_a_worker_that_can_not_start_ends_the_wait(
    make_pool: MakePool, argument: str, kind: type[DpgenError], message: str
) -> None:
    pool = make_pool(argument)
    with pytest.raises(DpgenError) as raised:
        wait_ready(pool)
    assert (type(raised.value), str(raised.value)) == (kind, message), "what kills workers is no wrong configuration"


def test_workers_end_with_their_pool(make_pool: MakePool) -> None:
    pool = make_pool()
    pid = wait_ready(pool)["pid"]
    pool.submit("a", "hang")
    pool.close()
    assert not Path(f"/proc/{pid}").exists()
