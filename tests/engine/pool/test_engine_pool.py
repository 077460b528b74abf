"""Several engines that look like one, with scripted processes and a clock that stands still."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest
from helpers.clock import FakeClock

from dpgen.engine.messages import (
    EngineInfo,
    EngineReady,
    EngineSpec,
    EngineStats,
    EngineTextConfig,
    Event,
    KvBytesMeasured,
    OptionsChecked,
    RowsFinished,
)
from dpgen.engine.pool.engine_count import EngineCount
from dpgen.engine.pool.engine_pool import EnginePool
from dpgen.engine.starting.limits import EngineLimits
from dpgen.errors import EngineError
from dpgen.journal.engine_notes import BlameState
from dpgen.records import Completion, Request, RequestId, RowResult
from dpgen.tuning.probe import LimitedEngine

LIMITS = EngineLimits(timeout_s=60.0, start_timeout_s=600.0, max_deaths=3, start_retry_s=5.0)
NUM_SEQS = 8
SIGKILLED = EngineError("the engine process was killed by SIGKILL", signal=signal.SIGKILL)
CRASHED = EngineError("the engine failed: RuntimeError: no such kernel")


class ScriptedProcess:
    """Report what the test tells it to: finished rows, statistics, or its death."""

    log_path: Path | None = None
    pipe = cast(Connection, None)  # nothing waits for it here

    def __init__(self, spec: EngineSpec, index: int) -> None:
        self.spec, self.index = spec, index
        self.events: list[Event] = [OptionsChecked(num_engines=spec.num_engines)]
        self.requests: list[Request] = []
        self.kv_bytes: int | None = None
        self.is_loading = self.is_loaded_by_test = self.is_ended = False
        self.death: EngineError | None = None

    @property
    def rows(self) -> list[int]:
        return [request.row for request in self.requests]

    def load_model(self, kv_bytes: int | None = None) -> None:
        self.is_loading = True
        if kv_bytes is None:
            self.events.append(KvBytesMeasured(1000))
        self.kv_bytes = kv_bytes

    def set_text_config(self, text_config: EngineTextConfig) -> None: ...

    def set_kv_bytes(self, num_bytes: int) -> None:
        self.kv_bytes = num_bytes
        self.become_ready()

    def become_ready(self) -> None:
        self.events.append(EngineReady(EngineInfo(NUM_SEQS, 100, 64, 16)))

    def submit(self, requests: list[Request]) -> None:
        self.requests += requests

    def finish(self, count: int) -> None:
        done, self.requests = self.requests[:count], self.requests[count:]
        results = [RowResult(one.row, 1, (Completion("x", "stop", 1),), call=one.id.call) for one in done]
        self.events.append(RowsFinished(results))

    def poll(self, timeout_s: float) -> list[Event]:
        if self.death is not None:
            raise self.death
        events, self.events = self.events, []
        return events

    def show_errors(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None:
        self.is_ended = True

    def kill(self) -> None:
        self.is_ended = True


class Harness:
    """A pool whose first engine is loaded, and its engines' processes so far."""

    def __init__(
        self,
        count: EngineCount,
        rows_left: float = 1e6,
        *,
        max_engines: int | None = None,
        sampling: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.clock, self.processes, self.decided = FakeClock(), list[ScriptedProcess](), list[EngineCount]()
        num_engines = max_engines or count.number
        spec = EngineSpec("fake", "m", num_engines=num_engines, is_num_engines_auto=count.is_auto, sampling=sampling)
        self.pool = EnginePool(self.start, spec, LIMITS, count, clock=self.clock)
        self.pool.growth.on_decided = self.decided.append
        self.pool.growth.get_rows_left = lambda: rows_left
        self.pool.check_options(lambda: None)
        self.pool.load_model(lambda measured: measured - 100, lambda: None)

    def start(self, spec: EngineSpec, index: int = 0) -> ScriptedProcess:
        self.processes.append(ScriptedProcess(spec, index))
        return self.processes[-1]

    def poll(self, seconds: float = 1.0) -> list[Event]:
        self.clock.now_s += seconds
        return self.pool.poll(0)

    def join_all(self, num_polls: int = 20) -> None:
        """Let each engine that loads become ready, until no more do."""
        for _ in range(num_polls):
            for process in self.processes:
                if process.is_loading and process.index and not process.is_loaded_by_test:
                    process.is_loaded_by_test = True
                    process.become_ready()
            self.poll()

    def fill_kv_cache(self) -> None:
        """Report a full KV cache for some seconds, and let the engine that joins then become ready."""
        for second in range(6):
            self.processes[0].events.append(EngineStats(1000 + second, NUM_SEQS // 2, kv_cache_usage=0.97))
            self.poll()
        self.join_all()

    def let_die_at_starts(self, index: int) -> None:
        """Let an engine that has not loaded die until it is abandoned."""
        while not self.pool.supervisors[index].is_abandoned:
            self.newest(index).death = CRASHED
            self.poll()
            self.poll(LIMITS.start_retry_s)

    def submit(self, rows: range) -> None:
        self.pool.submit([Request(RequestId(row), [row]) for row in rows])

    def newest(self, index: int) -> ScriptedProcess:
        return [process for process in self.processes if process.index == index][-1]

    def finish_all(self, count: int) -> list[int]:
        """Let all processes finish what they have until `count` rows are finished, and return these."""
        rows: list[int] = []
        for _ in range(100):
            for process in self.processes:
                if not process.is_ended and process.rows and process.death is None:
                    process.finish(len(process.rows))
            rows += [row.row for event in self.poll() if isinstance(event, RowsFinished) for row in event.results]
            if len(rows) >= count:
                return rows
        return rows


def given(number: int) -> EngineCount:
    return EngineCount(number, f"parallel.engines_per_rank={number}")


def test_the_first_engine_generates_while_the_others_load_one_after_the_other() -> None:
    harness = Harness(given(3))
    assert len(harness.processes) == 3, "their processes import vLLM while the first loads"
    assert harness.pool.max_num_seqs == NUM_SEQS
    harness.submit(range(4))
    for _ in range(4):
        harness.poll()
    assert [process.is_loading for process in harness.processes] == [True, True, False], "each measures memory alone"
    assert harness.processes[0].rows == [0, 1, 2, 3]
    harness.join_all()
    assert harness.pool.max_num_seqs == 3 * NUM_SEQS and harness.pool.num_ready == 3
    assert [process.kv_bytes for process in harness.processes] == [900] * 3, "the ranks agree once"
    assert harness.decided == [given(3)]


def test_one_engine_is_never_more_than_one_process() -> None:
    harness = Harness(given(1))
    harness.join_all()
    harness.submit(range(20))
    assert len(harness.processes) == 1 and harness.finish_all(20) == list(range(20))


def test_rows_go_to_the_engine_with_the_fewest_sequences() -> None:
    harness = Harness(given(2))
    harness.submit(range(6))
    harness.join_all()
    harness.submit(range(6, 16))
    assert [len(process.rows) for process in harness.processes] == [8, 8]


def test_the_rows_of_an_engine_killed_from_outside_go_to_the_others_at_once() -> None:
    harness = Harness(given(2))
    harness.join_all()
    harness.submit(range(12))
    harness.newest(1).death = SIGKILLED
    harness.poll()
    assert sorted(harness.newest(0).rows) == list(range(12)), "the other goes on with all rows"
    harness.submit(range(12, 14))
    assert harness.newest(1).rows == [], "an engine that starts gets no rows"
    assert harness.pool.max_num_seqs == NUM_SEQS and harness.pool.num_deaths == 1
    assert sorted(harness.finish_all(14)) == list(range(14)), "each row once"
    harness.newest(1).become_ready()
    harness.poll()
    assert harness.pool.max_num_seqs == 2 * NUM_SEQS


def test_rows_that_may_have_crashed_an_engine_stay_with_it() -> None:
    harness = Harness(given(2))
    harness.join_all()
    harness.submit(range(12))
    before = list(harness.newest(1).rows)
    harness.newest(1).death = CRASHED
    harness.poll()
    assert not set(before) & set(harness.newest(0).rows)
    assert harness.pool.max_num_seqs == NUM_SEQS + len(before), "the other's share is not taken by rows that wait"
    harness.poll(LIMITS.start_retry_s)
    harness.newest(1).become_ready()
    harness.poll()
    assert sorted(harness.newest(1).rows) == sorted(before)


def test_an_abandoned_engines_rows_go_to_the_ranks_other_engines(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(given(2))
    harness.join_all()
    harness.submit(range(12))
    while not harness.pool.supervisors[1].is_abandoned:
        harness.newest(1).death = CRASHED
        harness.poll(2 * LIMITS.start_retry_s)
    assert not harness.pool.is_abandoned, "the rank is not without an engine"
    assert any("to this rank's other engines" in message for message in caplog.messages)
    assert sorted(harness.finish_all(12)) == list(range(12))
    while not harness.pool.is_abandoned:
        harness.newest(0).death = CRASHED
        harness.poll(2 * LIMITS.start_retry_s)
    assert "to other ranks" in caplog.messages[-1], "the last one leaves its rows to other ranks"
    assert harness.pool.max_num_seqs == 0


def test_a_rank_whose_only_loaded_engine_is_abandoned_leaves_its_rows_to_other_ranks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    harness = Harness(EngineCount(3, "measured later", is_auto=True))
    assert len(harness.processes) == 3, "two wait until it is known how many pay"
    harness.submit(range(4))
    for _ in range(2 * LIMITS.max_deaths):
        harness.newest(0).death = CRASHED
        harness.poll(2 * LIMITS.start_retry_s)
    assert harness.pool.is_abandoned, "those that have not loaded would wait for ever"
    assert caplog.messages[-2].endswith("leaving 4 rows to other ranks")
    assert caplog.messages[-1] == (
        "no engine of this rank that has loaded the model is left, ending 2 engines that have not"
    )


def test_a_second_plan_takes_nothing_from_what_the_engines_know_of_their_rows() -> None:
    harness = Harness(given(1))
    harness.pool.recall(BlameState(), lambda: None)
    harness.submit(range(4))
    for _ in range(2):
        harness.newest(0).death = CRASHED
        harness.poll()
        harness.poll()
        harness.newest(0).become_ready()
        harness.pool.recall(BlameState(), lambda: None)  # after a loss of ranks
        harness.poll()
    assert harness.newest(0).rows, "the engine goes on with its suspects"


def test_a_further_engine_that_does_not_start_leaves_the_run_to_the_others(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(given(2))
    harness.poll()
    harness.let_die_at_starts(1)
    assert [message.split(", ", 1)[1] for message in caplog.messages] == [
        "restarting it in 5 s",
        "restarting it in 5 s",
        "abandoning it after 3 deaths in a row",
    ], "what a line says happens, and no row is left to anybody"
    assert len([process for process in harness.processes if process.index == 1]) == 3
    assert [count.number for count in harness.decided] == [2, 1], "run.json and the report say what runs"
    assert harness.decided[-1].why.endswith("engine 1 does not start")
    harness.submit(range(8))
    assert sorted(harness.finish_all(8)) == list(range(8))


def test_those_after_an_engine_that_does_not_start_join_and_all_are_counted() -> None:
    harness = Harness(given(3))
    harness.poll()
    harness.let_die_at_starts(1)
    harness.join_all()
    assert harness.pool.num_ready == 2 == harness.decided[-1].number
    harness.submit(range(16))
    assert sorted(harness.finish_all(16)) == list(range(16))


@pytest.mark.parametrize("device_busy", [0.2, 0.96])
def test_one_that_does_not_start_while_the_first_is_measured_is_one_less(device_busy: float) -> None:
    harness = Harness(AUTO)
    harness.let_die_at_starts(1)
    calibrate(harness, device_busy)
    harness.join_all()
    number = 3 if device_busy == 0.2 else 1
    assert harness.pool.num_ready == number == harness.decided[-1].number
    assert len([process for process in harness.processes if not process.is_ended]) == number


def test_a_surplus_engine_that_does_not_start_is_no_engine_less(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(AUTO)
    harness.submit(range(100))
    for _ in range(LIMITS.max_deaths - 1):
        harness.newest(1).death = CRASHED
        harness.poll()
        harness.poll(LIMITS.start_retry_s)
    growth = harness.pool.growth
    monkeypatch.setattr(growth, "measure", lambda stats: setattr(growth, "count", EngineCount(1, "measured")))
    harness.processes[0].events.append(EngineStats(1, 1))
    harness.newest(1).death = CRASHED  # in the poll that finds one engine to be enough
    harness.poll()
    harness.poll()
    assert harness.pool.supervisors[1:] == [] or harness.pool.supervisors[1].is_abandoned
    assert (growth.count.number, harness.pool.num_ready, harness.pool.is_abandoned) == (1, 1, False)


def test_rows_of_no_samples_are_left_to_the_engine_to_reject() -> None:
    harness = Harness(AUTO)
    harness.pool.submit([Request(RequestId(row), [row], sampling={"n": 0}) for row in range(5)])
    harness.poll()
    assert harness.newest(0).rows == list(range(5))


def test_each_ready_engine_has_a_kv_cache_and_one_that_starts_again_for_the_rows_that_wait_for_it() -> None:
    harness = Harness(given(2))
    harness.join_all()
    limited = LimitedEngine(harness.pool, lambda largest: 2)
    harness.submit(range(8))
    assert (harness.pool.num_caches, limited.num_caches) == (2, 2)
    harness.newest(0).death = CRASHED
    harness.poll()
    assert harness.pool.num_caches == 2, "its rows may have crashed it, and stay"
    harness = Harness(given(2))
    harness.join_all()
    harness.submit(range(8))
    harness.newest(0).death = SIGKILLED
    harness.poll()
    assert harness.pool.num_caches == 1, "its rows have gone to the other one"


def test_an_engine_that_did_not_start_is_not_counted_where_too_few_rows_are_left_for_the_others() -> None:
    harness = Harness(AUTO)
    calibrate(harness, device_busy=0.2)
    harness.let_die_at_starts(1)
    harness.join_all(1)
    assert harness.pool.num_ready == 2
    harness.pool.growth.get_rows_left = lambda: 0
    harness.join_all()
    assert harness.pool.num_ready == 2 == harness.decided[-1].number
    assert "too few rows are left" in harness.decided[-1].why


def test_statistics_are_sums_and_outlive_an_engine() -> None:
    harness = Harness(given(2))
    harness.join_all()
    harness.submit(range(8))
    first, second = harness.newest(0), harness.newest(1)
    first.events.append(EngineStats())
    harness.poll(0.1)
    first.events.append(EngineStats(100, 4, 1, 2, 3, 200, kv_cache_usage=0.5))
    assert not [event for event in harness.poll(0.1) if isinstance(event, EngineStats)], "the sum waits for both"
    second.events.append(EngineStats(50, 3, 0, 1, 1, 90, kv_cache_usage=0.25))
    [total] = harness.poll(0.1)
    assert total == EngineStats(150, 7, 1, 3, 4, 290, kv_cache_usage=0.375)
    second.death = SIGKILLED
    harness.poll()
    first.events.append(EngineStats(120, 4, 0, 2, 3, 220, kv_cache_usage=0.5))
    [total] = [event for event in harness.poll() if isinstance(event, EngineStats)]
    assert (total.num_generated_tokens, total.num_running) == (170, 4), "what it had generated counts, it runs nothing"


def calibrate(harness: Harness, device_busy: float, processor: float = 0.95, rows_left: float = 1e6) -> None:
    """Report steps of 8 ms from a full first engine, which finishes some rows, until the pool has decided."""
    harness.pool.growth.get_rows_left = lambda: rows_left
    harness.submit(range(1000, 1000 + NUM_SEQS + 2))
    for second in range(1, 12):
        steps, elapsed_s = 125 * second, float(second)
        times: dict[str, Any] = {"num_steps": steps, "elapsed_s": elapsed_s, "processor_s": processor * elapsed_s}
        stats = EngineStats(steps, NUM_SEQS, 2, device_busy=device_busy)
        harness.processes[0].events.append(dataclasses.replace(stats, **times))
        harness.poll()
        if harness.decided:
            return


def test_samples_are_for_the_calibration_alone() -> None:
    harness = Harness(AUTO)
    harness.submit(range(4))
    harness.processes[0].events += [EngineStats(10, 4), EngineStats(20, 4, is_sample=True), EngineStats(30, 4)]
    stats = [event for event in harness.poll() if isinstance(event, EngineStats)]
    assert [one.num_generated_tokens for one in stats] == [10, 30]


AUTO = EngineCount(4, "weights of 2.5 GB, at most 4", is_auto=True)


def test_auto_starts_as_many_engines_as_the_device_has_time_for() -> None:
    harness = Harness(AUTO)
    calibrate(harness, device_busy=0.38)
    [count] = harness.decided
    assert count.number == 3 and "GPU busy 0.38" in count.why and "8.0 ms" in count.why
    harness.join_all()
    assert harness.pool.num_ready == 3
    alive = [process for process in harness.processes if not process.is_ended]
    assert len(alive) == 3, "the process that is not wanted is ended"


@pytest.mark.parametrize(("device_busy", "processor"), [(0.96, 0.95), (0.4, 0.3)])
def test_auto_stays_with_one_engine_where_the_device_or_nothing_of_ours_is_the_limit(
    device_busy: float, processor: float
) -> None:
    harness = Harness(AUTO)
    calibrate(harness, device_busy, processor)
    harness.join_all()
    assert [count.number for count in harness.decided] == [1] and harness.pool.num_ready == 1
    assert [process.is_ended for process in harness.processes] == [False, True, True, True]


def test_a_trial_of_settings_lets_the_first_engine_be_full_until_engines_are_counted() -> None:
    harness = Harness(AUTO)
    limited = LimitedEngine(harness.pool, lambda largest: 2)
    assert (limited.max_num_seqs, limited.has_all_engines) == (NUM_SEQS, False)
    calibrate(harness, device_busy=0.38)
    harness.join_all()
    assert (limited.num_engines, limited.max_num_seqs, limited.has_all_engines) == (3, 3 * 2, True)
    limited.limit = 4
    assert (limited.largest, limited.max_num_seqs) == (NUM_SEQS, 3 * 4)


def test_auto_starts_nothing_for_a_job_that_is_almost_over() -> None:
    harness = Harness(AUTO, rows_left=20)
    calibrate(harness, device_busy=0.2, rows_left=20)
    harness.join_all()
    assert len(harness.processes) == 1
    assert harness.decided[-1].number == 1 and "too few rows are left" in harness.decided[-1].why


def test_a_job_of_few_rows_is_one_engine_at_once_and_says_so() -> None:
    harness = Harness(AUTO, rows_left=2 * NUM_SEQS - 1)
    harness.submit(range(4))
    harness.poll()
    [count] = harness.decided
    assert count.describe() == (
        "1 engine a rank: weights of 2.5 GB, at most 4; too few rows are left for another to pay"
    )
    harness.processes[0].finish(4)
    assert sum(isinstance(event, RowsFinished) for event in harness.poll()) == 1
    assert harness.pool.has_joined_all


def test_the_time_until_the_first_row_does_not_make_a_rank_look_slow() -> None:
    harness = Harness(AUTO)
    harness.poll(3600)  # other ranks load
    harness.pool.growth.get_rows_left = lambda: 1100
    harness.submit(range(1000))
    harness.processes[0].finish(1000)
    calibrate(harness, device_busy=0.2, rows_left=100)
    assert harness.decided[-1].number == 1 and "too few rows are left" in harness.decided[-1].why


def test_calls_of_programs_and_retries_are_not_taken_for_rows() -> None:
    harness = Harness(AUTO)
    harness.pool.growth.get_rows_left = lambda: 100
    for call in range(30):  # of which each row makes hundreds
        harness.pool.submit([Request(RequestId(row, call), [row]) for row in range(NUM_SEQS)])
        harness.processes[0].finish(NUM_SEQS)
        harness.poll(0.01)
    calibrate(harness, device_busy=0.38, rows_left=100)
    assert harness.decided[-1].number == 3, "not a row is finished, so minutes or hours are left"


@pytest.mark.parametrize("own", [{}, {"n": 64}])
def test_few_rows_of_many_samples_are_many_sequences(own: dict[str, int]) -> None:
    harness = Harness(AUTO, rows_left=10, sampling={} if own else {"n": 64})
    harness.pool.submit([Request(RequestId(row), [row], sampling=own) for row in range(4)])
    calibrate(harness, device_busy=0.38, rows_left=10)
    assert harness.decided[-1].number == 3, "640 sequences are left"


def test_calls_that_programs_make_together_are_many_sequences() -> None:
    harness = Harness(AUTO, rows_left=10)
    harness.pool.submit([Request(RequestId(row, call), [row]) for row in range(4) for call in range(64)])
    harness.poll()
    assert not harness.decided, "it is measured first: 640 sequences are left"


def test_rows_that_a_lost_rank_leaves_do_not_hide_those_that_were_finished() -> None:
    harness = Harness(AUTO)
    harness.pool.growth.get_rows_left = lambda: 1000
    harness.submit(range(900))
    harness.processes[0].finish(900)
    for rows_left in (100, 200):  # the run's last 200 are one rank's then, no longer two ranks'
        harness.pool.growth.get_rows_left = lambda rows_left=rows_left: rows_left
        harness.poll()
    calibrate(harness, device_busy=0.38, rows_left=200)
    assert harness.decided[-1].number == 1 and "too few rows are left" in harness.decided[-1].why


def test_the_memory_may_have_room_for_fewer_engines(caplog: pytest.LogCaptureFixture) -> None:
    class Small(Harness):
        def start(self, spec: EngineSpec, index: int = 0) -> ScriptedProcess:
            process = super().start(spec, index)
            process.events = [OptionsChecked(num_engines=2, memory_fraction=0.49)]
            return process

    harness = Small(AUTO)
    assert harness.pool.growth.count.number == 2 and "room for 2" in harness.pool.growth.count.why
    calibrate(harness, device_busy=0.1)
    harness.join_all()
    assert harness.pool.num_ready == 2
    parts = {(process.spec.num_engines, process.spec.memory_fraction) for process in harness.processes[1:]}
    assert parts == {(2, 0.49)}, "all divide the same memory by the same number"


def test_a_row_of_many_samples_counts_as_many_sequences() -> None:
    harness = Harness(given(2))
    harness.join_all()
    requests = [Request(RequestId(0), [0], sampling={"n": 6})]
    requests += [Request(RequestId(row), [row]) for row in range(1, 7)]
    harness.pool.submit(requests)
    assert len(harness.newest(0).rows) == 1 and len(harness.newest(1).rows) == 6


def test_closing_ends_every_engine() -> None:
    harness = Harness(given(3))
    harness.join_all()
    harness.pool.close()
    assert all(process.is_ended for process in harness.processes)


def test_memory_that_was_left_for_an_engine_is_used_once_the_kv_cache_is_full() -> None:
    harness = Harness(AUTO)
    calibrate(harness, device_busy=0.96)
    harness.join_all()
    assert harness.pool.num_ready == 1
    harness.fill_kv_cache()
    assert harness.pool.num_ready == 2 and "later the KV cache was full" in harness.decided[-1].why


def test_a_later_job_with_kept_engines_uses_the_memory_that_was_left_for_others() -> None:
    first = Harness(AUTO)
    calibrate(first, device_busy=0.96)
    kept, max_engines = first.pool.growth.count, first.pool.growth.max_engines
    assert (kept.number, max_engines) == (1, 4)
    second = Harness(kept, max_engines=max_engines)
    second.join_all()
    assert second.pool.num_ready == 1
    second.fill_kv_cache()
    assert second.pool.num_ready == 2 and second.decided[-1].number == 2
    for _ in range(4):
        second.fill_kv_cache()
    assert second.pool.num_ready == 4, "no more than there is memory for"


def test_a_given_number_of_engines_stays_as_it_is_with_a_full_kv_cache() -> None:
    harness = Harness(given(2))
    harness.join_all()
    harness.fill_kv_cache()
    assert harness.pool.num_ready == 2 and len(harness.decided) == 1


def test_a_load_that_stalls_does_not_keep_an_engine_that_has_worked_from_starting_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    harness = Harness(given(2))
    harness.submit(range(8))
    harness.poll()
    harness.poll()
    assert harness.newest(1).is_loading
    harness.newest(0).death = SIGKILLED
    for _ in range(4):
        harness.poll()
    assert not harness.newest(0).is_loading, "the load that has begun is likely to end first"
    assert "no engine of this rank is ready, waiting up to 5 s until engine 1 is" in caplog.messages
    stalled = harness.newest(1)
    for _ in range(4):
        harness.poll()
    assert stalled.is_ended and harness.newest(0).is_loading
    harness.newest(0).become_ready()
    assert sorted(harness.finish_all(8)) == list(range(8))
    harness.poll(LIMITS.start_retry_s)
    harness.join_all()
    assert harness.pool.num_ready == 2, "the other one joins after that"
    assert [message for message in caplog.messages if "waiting up to" in message] == [caplog.messages[1]], "once"


def test_a_load_that_ends_in_time_goes_on_while_no_engine_is_ready() -> None:
    harness = Harness(given(2))
    harness.submit(range(8))
    harness.poll()
    harness.poll()
    harness.newest(0).death = SIGKILLED
    harness.poll()
    harness.poll(4)
    harness.newest(1).become_ready()
    assert sorted(harness.finish_all(8)) == list(range(8))
    assert len([process for process in harness.processes if process.index == 1]) == 1
    harness.newest(0).become_ready()
    harness.poll(10)
    assert harness.pool.num_ready == 2


def test_engines_that_die_together_load_one_after_the_other() -> None:
    harness = Harness(given(3))
    harness.join_all()
    harness.submit(range(12))
    for index in range(3):  # a fault of the GPU, or of NVIDIA's MPS daemon, ends all of its processes
        harness.newest(index).death = SIGKILLED
    for num_ready in range(3):
        harness.poll()
        harness.poll()
        loading = [harness.newest(index).is_loading for index in range(3)]
        assert sum(loading) == num_ready + 1, "each measures memory alone"
        harness.newest(loading.index(True) if num_ready == 0 else num_ready).become_ready()
    harness.poll()
    assert harness.pool.num_ready == 3
    assert sorted(harness.finish_all(12)) == list(range(12)), "each row once"


def test_a_further_engine_waits_while_another_one_starts_again() -> None:
    harness = Harness(given(2))
    harness.submit(range(4))
    harness.newest(0).death = SIGKILLED
    harness.poll()
    harness.poll()
    assert [process.is_loading for process in harness.processes if not process.is_ended] == [True, False]
    [waiting] = [process for process in harness.processes if process.is_loading and not process.is_ended]
    waiting.become_ready()
    harness.poll()
    harness.poll()
    assert [process.is_loading for process in harness.processes if not process.is_ended] == [True, True]


def test_an_engine_that_waits_for_others_to_load_is_not_taken_for_one_that_hangs() -> None:
    harness = Harness(given(4))
    for index in (1, 2):
        for _ in range(4):
            harness.poll(LIMITS.start_timeout_s / 5)
        harness.newest(index).become_ready()
        harness.poll()
    assert harness.pool.num_ready == 3 and harness.pool.num_deaths == 0
    assert len(harness.processes) == 4


def test_an_engine_that_starts_again_is_ended_at_once_when_the_run_ends() -> None:
    harness = Harness(given(2))
    harness.join_all()
    harness.newest(0).death = SIGKILLED
    harness.poll()
    harness.poll()
    assert harness.newest(0).is_loading
    harness.pool.stop()
    assert harness.newest(0).is_ended, "it would read the request to end only once it has loaded"
    assert not harness.newest(1).is_ended
