"""Tests of what prepares requests with media, with workers that answer when the test says so."""

from __future__ import annotations

import pickle
from array import array
from typing import Any

import pytest
from helpers.clock import FakeClock

from dpgen.data.media.parts import MediaPart, MediaText
from dpgen.data.media.policy import MediaPolicy
from dpgen.engine.media.buffers import BufferAddress
from dpgen.engine.media.handling import PreparedAnswer, RejectedAnswer
from dpgen.engine.media.preparer import TASKS_AHEAD, MediaPreparer, PreparationLimits
from dpgen.errors import ConfigError
from dpgen.records import Request, RequestId, RowResult
from dpgen.workers.pool import Answer, WorkerRefused


class ScriptedWorkers:
    """Hold the tasks until the test answers them."""

    def __init__(self) -> None:
        self.tasks: dict[int, BufferAddress] = {}
        self.answers: list[Answer] = []
        self.error: Exception | None = None
        self.is_closed = False

    def submit(self, key: int, task: Any) -> None:
        self.tasks[key] = task

    def poll(self) -> list[Answer]:
        if self.error is not None:
            raise self.error
        answers, self.answers = self.answers, []
        return answers

    def close(self) -> None:
        self.is_closed = True

    def finish(self, key: int, num_bytes: int = 1000) -> None:
        [data] = self.tasks[key].read()
        prompt, _ = pickle.loads(data)
        written = self.tasks.pop(key).write([bytes(num_bytes)])
        self.answers.append(Answer(key, PreparedAnswer(array("i", [len(prompt.text)]), written)))

    def fail(self, key: int, **answer: Any) -> None:
        del self.tasks[key]
        self.answers.append(Answer(key, **answer))


class Harness:
    def __init__(self, *, is_required: bool = True, **limits: int) -> None:
        self.clock = FakeClock()
        self.workers = ScriptedWorkers()
        self.num_starts = 0
        limit = PreparationLimits(**limits)
        self.preparer = MediaPreparer(self._start, limit, MediaPolicy(), self.clock, is_required=is_required)
        self.queue = self.preparer.open_queue()

    def _start(self) -> ScriptedWorkers:
        self.num_starts += 1
        return self.workers

    def add(self, *rows: int) -> None:
        for row in rows:
            self.queue.add(make_request(row))

    def take(self) -> Request | RowResult | None:
        self.clock.now_s += 1
        return self.queue.take()


def make_request(row: int) -> Request:
    return Request(RequestId(row), None, MediaText("x" * row, (MediaPart("image", "image", b"file"),)))


def test_only_requests_with_media_are_prepared_and_the_first_one_starts_the_workers() -> None:
    harness = Harness()
    assert not harness.preparer.needs(Request(RequestId(0), [1]))
    assert not harness.preparer.needs(Request(RequestId(0), None, "text"))
    assert harness.preparer.needs(make_request(0))
    assert harness.take() is None
    assert harness.num_starts == 0
    harness.add(1, 2)
    assert harness.num_starts == 1


def test_requests_come_back_as_they_get_ready_with_their_tokens_and_memory() -> None:
    harness = Harness()
    harness.add(3, 4)
    assert len(harness.queue) == 2
    assert harness.take() is None
    harness.workers.finish(2)
    second = harness.take()
    harness.workers.finish(1)
    first = harness.take()
    assert isinstance(second, Request)
    assert isinstance(first, Request)
    assert (second.row, second.prompt_token_ids, second.prompt) == (4, [4], None)
    assert (first.row, first.prompt_token_ids) == (3, [3])
    assert [bytes(part) for part in first.media.address.read()] == [bytes(1000)]
    assert not harness.preparer.needs(first), "what follows from a request is not prepared again"
    assert len(harness.queue) == 0


def test_what_is_ready_is_bounded_by_bytes_but_one_row_is_prepared_whatever_its_size() -> None:
    harness = Harness(num_workers=2, max_prepared_bytes=5000)
    harness.add(*range(20))
    assert len(harness.workers.tasks) == 2 * TASKS_AHEAD, "no size is known yet"
    for key in list(harness.workers.tasks):
        harness.workers.finish(key, 2400)
    assert harness.take() is not None
    while harness.take() is not None:
        assert harness.queue.ready_bytes + 2400 * len(harness.workers.tasks) <= 5000 + 2 * TASKS_AHEAD * 2500
    assert len(harness.workers.tasks) == 1 or len(harness.workers.tasks) == 2, "two rows fit"
    for key in list(harness.workers.tasks):
        harness.workers.finish(key, 90_000)
    taken = [harness.take(), harness.take()]
    assert None not in taken
    assert len(harness.workers.tasks) == 1, "a row above the limit is prepared alone"


def test_rows_in_the_engine_count_until_they_end_and_a_larger_row_goes_alone() -> None:
    harness = Harness(num_workers=1, max_held_bytes=10_000)
    harness.add(*range(1, 30))
    in_engine: list[Any] = []
    most_held = most_in_engine = 0

    def work() -> None:
        nonlocal most_held, most_in_engine
        for key in list(harness.workers.tasks):
            harness.workers.finish(key, 50_000 if key == 20 else 2400)
        while (taken := harness.take()) is not None:
            in_engine.append(taken)
        held = sum(request.media.num_bytes for request in in_engine)
        most_held, most_in_engine = max(most_held, held), max(most_in_engine, len(in_engine))

    num_done = 0
    for _ in range(300):
        work()
        if not harness.workers.tasks and in_engine:
            if any(request.media.num_bytes > 10_000 for request in in_engine):
                assert most_held < 60_000
                most_held = 0
            in_engine.pop(0)
            num_done += 1
    assert num_done == 29, "no row waits for good"
    assert most_in_engine == 4, "as many as the limit has room for, and as workers had before a size was known"
    assert most_held <= 10_000


@pytest.mark.parametrize("num_small", [0, 1, 3])
def test_rows_that_are_all_larger_than_the_limit_go_one_by_one_once_their_size_is_known(num_small: int) -> None:
    harness = Harness(num_workers=1, max_held_bytes=10_000)
    harness.add(*range(1, 60))
    while len(harness.workers.tasks) != TASKS_AHEAD or num_small:
        harness.workers.finish(min(harness.workers.tasks), 500)
        num_small -= 1
        assert harness.take() is not None
    num_held: list[int] = []
    for num_bytes in [50_000] * 10 + [2400] * 4:
        num_held.append(len(harness.workers.tasks))
        for key in list(harness.workers.tasks):
            harness.workers.finish(key, num_bytes)
        while (taken := harness.take()) is not None:
            del taken  # the engine is done with it at once
        assert not harness.queue.ready_bytes
    assert num_held[0] == TASKS_AHEAD, "no size is known yet"
    assert set(num_held[1:11]) == {1}
    assert num_held[11] > 1, "a smaller row tells of those that follow"


def test_the_workers_get_more_while_the_engine_takes_nothing() -> None:
    harness = Harness()
    harness.add(*range(3 * TASKS_AHEAD))
    for _ in range(3):
        for key in list(harness.workers.tasks):
            harness.workers.finish(key)
        harness.clock.now_s += 1
        harness.queue.poll()
    taken = [harness.take() for _ in range(3 * TASKS_AHEAD)]
    assert None not in taken


def test_rows_in_the_engine_count_as_open_files() -> None:
    harness = Harness(max_buffers=3)
    harness.add(*range(8))
    assert len(harness.workers.tasks) == 3
    for key in list(harness.workers.tasks):
        harness.workers.finish(key)
    in_engine = [harness.take() for _ in range(2)]
    assert harness.take() is not None  # dropped at once
    harness.take()
    assert len(in_engine) + len(harness.workers.tasks) <= 3
    in_engine.clear()
    harness.clock.now_s += 1
    harness.preparer.poll()
    assert len(harness.workers.tasks) >= 1


@pytest.mark.parametrize(
    ("answer", "error_type"),
    [
        ({"failure": "preparing media took longer than 60 s", "has_timed_out": True}, "render_timeout"),
        ({"failure": "preparing media process died (exit status 1)"}, "render_crashed"),
        ({"value": RejectedAnswer("media_invalid", "image: no image")}, "media_invalid"),
    ],
)
def test_what_can_t_be_prepared_is_its_row_s_error(answer: dict[str, Any], error_type: str) -> None:
    harness = Harness()
    harness.add(1, 2)
    harness.workers.fail(1, **answer)
    harness.workers.finish(2)
    [failed, other] = [harness.take(), harness.take()]
    assert isinstance(failed, RowResult)
    assert failed.error is not None
    assert (failed.row, failed.error.type) == (1, error_type)
    assert isinstance(other, Request)


def test_a_worker_that_is_killed_costs_a_second_try_and_then_the_row() -> None:
    harness = Harness()
    harness.add(5)
    harness.workers.fail(1, failure="died (exit status -9)", signal=9)
    assert harness.take() is None
    assert list(harness.workers.tasks) == [2]
    harness.workers.fail(2, failure="died (exit status -9)", signal=9)
    failed = harness.take()
    assert isinstance(failed, RowResult)
    assert failed.error is not None
    assert failed.error.type == "render_crashed"
    assert "-9" in failed.error.message


def test_a_configuration_that_workers_reject_ends_the_run_in_one_line() -> None:
    harness = Harness()
    harness.add(1)
    harness.workers.error = WorkerRefused("preparing media can't start: the processor needs torchvision")
    with pytest.raises(ConfigError, match="needs torchvision"):
        harness.take()


def test_workers_that_can_t_start_cost_only_the_rows_that_need_them_where_no_column_of_media_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    harness = Harness(is_required=False)
    harness.add(*range(2 * TASKS_AHEAD))
    harness.workers.error = WorkerRefused("preparing media can't start: the processor needs torchvision: install it")
    results = [harness.take() for _ in range(2 * TASKS_AHEAD)]
    harness.add(30)
    results.append(harness.take())
    for result in results:
        assert isinstance(result, RowResult) and result.error is not None
        assert result.error.type == "unsupported_content" and "needs torchvision: install it" in result.error.message
    assert sorted(result.row for result in results if result) == [*range(2 * TASKS_AHEAD), 30]
    assert len(harness.queue) == 0
    assert harness.preparer.prepare_now(make_request(1), lambda: None) is None
    [record] = [record for record in caplog.records if "torchvision" in record.message]
    assert "run.retry_errors=[unsupported_content]" in record.message, "once, with what to do"


def test_a_closed_queue_leaves_its_room_to_others_and_gets_nothing_more() -> None:
    harness = Harness(num_workers=1, max_prepared_bytes=5000)
    harness.add(*range(1, 9))
    for key in (1, 2, 3, 4):
        harness.workers.finish(key, 2000)
    harness.clock.now_s += 1
    harness.queue.poll()
    old, harness.queue = harness.queue, harness.preparer.open_queue()
    old.close()
    assert len(old) == 0
    harness.add(20, 21)
    harness.workers.finish(5)
    taken = harness.take()
    assert isinstance(taken, Request)
    assert taken.row == 20
    assert old.take() is None


def test_a_request_that_is_needed_now_is_prepared_though_there_is_no_room() -> None:
    harness = Harness(num_workers=1, max_prepared_bytes=1000)
    harness.add(1, 2)
    harness.workers.finish(1, 5000)
    harness.clock.now_s += 1
    harness.queue.poll()  # nobody takes it
    num_waits = 0

    def on_wait() -> None:
        nonlocal num_waits
        num_waits += 1
        harness.clock.now_s += 1
        if num_waits == 1:
            harness.workers.finish(3, 5000)

    prepared = harness.preparer.prepare_now(make_request(7), on_wait)
    assert prepared is not None and prepared.row == 7 and num_waits >= 1


def test_no_more_buffers_are_held_than_the_process_may_have_files() -> None:
    harness = Harness(num_workers=1, max_buffers=16)
    harness.add(*range(1, 41))
    held = []
    for _ in range(200):
        for key in list(harness.workers.tasks):
            harness.workers.finish(key)
        if (taken := harness.take()) is not None:
            held.append(taken)
    assert len(held) == 16
    del held[:8]
    for _ in range(20):
        for key in list(harness.workers.tasks):
            harness.workers.finish(key)
        if (taken := harness.take()) is not None:
            held.append(taken)
    assert len(held) == 16
