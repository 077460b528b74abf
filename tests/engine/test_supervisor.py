"""The supervisor alone, with scripted processes: restarts, the rows to blame, and abandoning an engine."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import pytest
from helpers.clock import FakeClock

from dpgen.config.sections import RunConfig
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
from dpgen.engine.starting.limits import EngineLimits
from dpgen.engine.supervisor import EngineSupervisor
from dpgen.errors import ConfigError, EngineError, EngineStuck, LockstepEngineLost
from dpgen.records import Completion, Request, RequestId, RowError, RowResult, UndecodedRow

OOM = "the engine failed: OutOfMemoryError: CUDA out of memory"
LIMITS = EngineLimits(timeout_s=60.0, start_timeout_s=600.0, max_deaths=8)
LOG_PATH = Path("run/logs/rank-3.engine.log")

CauseFn = Callable[[set[int]], str | None]


class FakeProcess:
    """Answer immediately; `find_cause(rows)` returns what the process dies of with these rows, or None."""

    log_path: Path | None = LOG_PATH
    pipe = cast(Connection, None)  # nothing waits for it here
    sends_tokens = False  # instead of text

    def __init__(self, spec: EngineSpec, find_cause: CauseFn) -> None:
        self.spec, self._find_cause = spec, find_cause
        self._events: list[Event] = [OptionsChecked()]
        self._rows: list[int] = []
        self.kv_bytes: int | None = None
        self.killed = self.stopped = self.has_shown_errors = False
        self.num_loads = 0

    def load_model(self, kv_bytes: int | None = None) -> None:
        self.kv_bytes = kv_bytes
        self.num_loads += 1
        if kv_bytes is None:
            self._events.append(KvBytesMeasured(1000))

    def set_kv_bytes(self, num_bytes: int) -> None:
        self.kv_bytes = num_bytes

    def set_text_config(self, text_config: EngineTextConfig) -> None:
        kv_bytes = self.kv_bytes
        assert kv_bytes is not None, "the KV cache comes first"
        self._events.append(EngineReady(EngineInfo(self.spec.options.get("max_num_seqs", 8), 100, kv_bytes, 1)))

    def submit(self, requests: list[Request]) -> None:
        self._rows += [request.row for request in requests]

    def poll(self, timeout_s: float) -> list[Event]:
        if self._events:
            events, self._events = self._events, []
            return events
        if self._rows:
            cause = self._find_cause(set(self._rows))
            if cause is not None:
                raise EngineError(cause, log_path=self.log_path)
            rows, self._rows = self._rows, []
            if self.sends_tokens:
                return [RowsFinished([], [make_undecoded(row) for row in rows])]
            return [RowsFinished([RowResult(row, 1, (Completion("x", "stop", 1),)) for row in rows])]
        return []

    def show_errors(self) -> None:
        self.has_shown_errors = True

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.killed = True

    def kill(self) -> None:
        self.killed = True


def make_undecoded(row: int) -> UndecodedRow:
    return UndecodedRow(RowResult(row, 1, (Completion("", "stop", 1),)), ([9],), True)


class SupervisorHarness:
    """A supervisor with a loaded engine, its processes so far, and the clock that it reads."""

    def __init__(self, find_cause: CauseFn, limits: EngineLimits = LIMITS, can_restart: bool = True) -> None:
        self.clock = FakeClock()
        self.processes: list[FakeProcess] = []

        def start(spec: EngineSpec) -> FakeProcess:
            self.processes.append(FakeProcess(spec, find_cause))
            return self.processes[-1]

        self.engine = EngineSupervisor(
            start, EngineSpec("fake", "m"), limits, can_restart=can_restart, clock=self.clock
        )
        self.engine.check_options(lambda: None)
        self.engine.load_model(lambda measured: measured - 100, lambda: None)

    def run(self, rows: range, num_polls: int = 200) -> dict[int, RowResult]:
        self.engine.submit([Request(RequestId(row), [1]) for row in rows])
        results: dict[int, RowResult] = {}
        for _ in range(num_polls):
            for event in self.engine.poll(0):
                assert isinstance(event, RowsFinished)
                for result in event.results:
                    assert result.row not in results, "a row is finished once"
                    results[result.row] = result
            self.clock.now_s += 1
        return results


def test_limits_are_those_of_the_configuration() -> None:
    run = RunConfig(dir="x", engine_timeout_s=1, engine_start_timeout_s=2, max_engine_deaths=3)
    assert EngineLimits.from_config(run) == EngineLimits(timeout_s=1, start_timeout_s=2, max_deaths=3)


def test_a_dead_engines_rows_go_to_its_next_life_with_the_agreed_kv_size(caplog: pytest.LogCaptureFixture) -> None:
    causes = iter(["the engine process was killed by SIGKILL", *[None] * 100])
    harness = SupervisorHarness(lambda rows: next(causes))
    results = harness.run(range(10))
    assert sorted(results) == list(range(10)) and not any(result.error for result in results.values())
    assert [process.kv_bytes for process in harness.processes] == [900, 900]
    assert harness.processes[0].killed, "the first life's process tree is ended"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2, "every rank shows them"
    assert [record.getMessage() for record in caplog.records] == [
        f"the engine process was killed by SIGKILL, restarting it, see {LOG_PATH}",
        "engine restarted, resuming 10 rows",
    ]


@pytest.mark.parametrize("poison", [{3}, {0, 9}])
def test_a_poison_row_is_found_and_recorded_and_costs_no_other_row(poison: set[int]) -> None:
    harness = SupervisorHarness(lambda rows: "the engine process was killed by SIGSEGV" if rows & poison else None)
    results = harness.run(range(10))
    assert sorted(results) == list(range(10))
    assert {row for row, result in results.items() if result.error} == poison
    for row in poison:
        error = results[row].error
        assert error is not None and error.type == "poison_row" and "SIGSEGV" in error.message
        assert str(LOG_PATH) not in error.message, "a row's result does not depend on the rank that generated it"
    assert not harness.engine.is_abandoned


def test_rows_to_decode_come_with_their_prompts_and_a_canary_is_not_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeProcess, "sends_tokens", True)
    harness = SupervisorHarness(lambda rows: "dead" if 2 in rows else None)
    undecoded: list[UndecodedRow] = []
    failed: list[int] = []
    for requests in (
        [Request(RequestId(0), [1, 2, 3]), Request(RequestId(1), None, "text")],
        [Request(RequestId(2), [1])],
    ):
        harness.engine.submit(requests)
        for event in (event for _ in range(30) for event in harness.engine.poll(0)):
            assert isinstance(event, RowsFinished) and (event.results or event.undecoded), "the canary leaves no event"
            undecoded += event.undecoded
            failed += [result.row for result in event.results]
    assert undecoded == [dataclasses.replace(make_undecoded(0), prompt_token_ids=[1, 2, 3]), make_undecoded(1)]
    assert failed == [2]


def test_counts_of_tokens_are_of_all_lives_and_without_the_canary() -> None:
    def report(stats: EngineStats) -> list[Event]:
        harness.processes[-1].poll = lambda timeout_s: [stats]  # type: ignore[method-assign]
        return harness.engine.poll(0)

    harness = SupervisorHarness(lambda rows: "dead" if 1 in rows else None)
    harness.run(range(1))
    assert report(EngineStats(5, 4, 3, 2, 1, 6)) == [EngineStats(5, 4, 3, 2, 1, 6)]
    del harness.processes[-1].poll
    assert harness.run(range(1, 2)).keys() == {1}, "after three deaths, and one canary of one token"
    assert report(EngineStats(10, 1, 1, 0, 0, 10)) == [EngineStats(5 + 10 - 1, 1, 1, 2, 1, 16)]


def test_a_row_is_not_blamed_for_a_kill_from_outside() -> None:
    signals = iter([*[signal.SIGKILL] * 5, *[None] * 100])

    def die(rows: set[int]) -> str | None:
        number = next(signals)
        if number is not None:
            raise EngineError("the engine process was killed by SIGKILL", signal=number)
        return None

    results = SupervisorHarness(die).run(range(1))
    assert results[0].error is None


def test_rows_in_flight_at_one_death_are_not_quarantined() -> None:
    causes = iter(["killed", *[None] * 100])
    harness = SupervisorHarness(lambda rows: next(causes))
    harness.run(range(10))
    assert len(harness.processes) == 2, "no row was tried alone"


def test_an_engine_that_dies_again_and_again_is_abandoned(caplog: pytest.LogCaptureFixture) -> None:
    limits = dataclasses.replace(LIMITS, max_deaths=2)
    harness = SupervisorHarness(lambda rows: "dead on arrival" if len(rows) else None, limits)
    results = harness.run(range(3))
    assert harness.engine.is_abandoned and not results
    assert harness.engine.max_num_seqs == 0
    assert caplog.messages[-1] == (
        f"dead on arrival, abandoning it after 2 deaths in a row, leaving 3 rows to other ranks, see {LOG_PATH}"
    )


def test_deaths_are_in_a_row_where_no_row_succeeded_between_them() -> None:
    limits = dataclasses.replace(LIMITS, max_deaths=2)
    causes = iter(["dead", None, "dead", None, "dead", "dead"])
    harness = SupervisorHarness(lambda rows: next(causes), limits)
    assert sorted(harness.run(range(1))) == [0] and sorted(harness.run(range(1, 2))) == [1]
    assert not harness.engine.is_abandoned
    assert not harness.run(range(2, 3))
    assert harness.engine.is_abandoned and harness.engine.num_deaths == 4


def test_a_rejected_row_does_not_show_that_the_engine_works() -> None:
    rejected = RowsFinished([RowResult(0, error=RowError("prompt_too_long", "too long"))])
    harness = SupervisorHarness(lambda rows: "dead", dataclasses.replace(LIMITS, max_deaths=2))
    harness.engine.submit([Request(RequestId(0), [1]), Request(RequestId(1), [1])])
    while not harness.engine.is_ready or len(harness.processes) == 1:
        harness.engine.poll(0)
    second = harness.processes[1]
    poll, second.poll = second.poll, lambda timeout_s: [rejected]  # type: ignore[method-assign]
    assert harness.engine.poll(0) == [rejected]
    second.poll = poll  # type: ignore[method-assign]
    harness.engine.poll(0)
    assert harness.engine.is_abandoned and harness.engine.num_deaths == 2


def test_an_engine_that_cannot_be_ended_is_abandoned_without_a_successor(caplog: pytest.LogCaptureFixture) -> None:
    def kill() -> None:
        raise EngineStuck("the engine process 7 can't be ended (it runs 30 s after SIGKILL)", log_path=LOG_PATH)

    harness = SupervisorHarness(lambda rows: "the engine sent no message")
    harness.processes[0].kill = kill  # type: ignore[method-assign]
    assert not harness.run(range(3))
    assert harness.engine.is_abandoned and len(harness.processes) == 1
    assert caplog.messages == [
        "the engine process 7 can't be ended (it runs 30 s after SIGKILL), abandoning it, since it holds its devices, "
        f"leaving 3 rows to other ranks, see {LOG_PATH}"
    ]


@pytest.mark.parametrize("end", ["close", "kill"])
def test_an_engine_that_cannot_be_ended_does_not_keep_its_rank_from_ending(
    caplog: pytest.LogCaptureFixture, end: str
) -> None:
    def fail() -> None:
        raise EngineStuck("the engine process 7 can't be ended (it runs 30 s after SIGKILL)", log_path=LOG_PATH)

    harness = SupervisorHarness(lambda rows: None)
    setattr(harness.processes[0], end, fail)
    getattr(harness.engine, end)()
    assert caplog.messages == [
        f"the engine process 7 can't be ended (it runs 30 s after SIGKILL), leaving it to the kernel, see {LOG_PATH}"
    ]


@pytest.mark.parametrize("end", ["stop", "close", "kill", "abandon"])
def test_every_way_to_end_an_engine_reaches_its_process_and_none_is_needed_once_it_is_abandoned(end: str) -> None:
    harness = SupervisorHarness(lambda rows: None)
    [process] = harness.processes
    getattr(harness.engine, end)()
    assert (process.stopped, process.killed) == (end == "stop", end != "stop")
    assert harness.engine.is_abandoned == (end == "abandon")
    harness.engine.abandon()
    process.stopped = process.killed = False
    getattr(harness.engine, end)()
    assert not process.stopped and not process.killed
    assert harness.engine.poll(0) == [] and harness.engine.max_num_seqs == 0


def test_the_death_of_an_engine_that_steps_together_ends_the_run_and_names_the_log() -> None:
    harness = SupervisorHarness(lambda rows: "the engine process was killed by SIGKILL", can_restart=False)
    with pytest.raises(LockstepEngineLost, match=f"was killed by SIGKILL, see {LOG_PATH}"):
        harness.run(range(3))
    assert harness.processes[0].killed


def test_a_silent_engine_with_work_counts_as_hung(caplog: pytest.LogCaptureFixture) -> None:
    harness = SupervisorHarness(lambda rows: None)
    harness.engine.submit([Request(RequestId(0), [1])])
    silent = harness.processes[0]
    silent.poll = lambda timeout_s: []  # type: ignore[method-assign]
    for _ in range(61):
        harness.clock.now_s += 1
        assert harness.engine.poll(0) == []
    assert len(harness.processes) == 2
    assert caplog.messages[0] == (
        "the engine sent no message for 61 s while it had work (run.engine_timeout_s=60), "
        f"restarting it, see {LOG_PATH}"
    )
    assert sorted(harness.run(range(1, 3))) == [0, 1, 2]


def test_an_engine_that_reports_stats_and_gets_nowhere_counts_as_hung(caplog: pytest.LogCaptureFixture) -> None:
    harness = SupervisorHarness(lambda rows: None)
    harness.engine.submit([Request(RequestId(0), [1])])
    stuck = harness.processes[0]
    stuck.poll = lambda timeout_s: [EngineStats(7, num_waiting=1)]  # type: ignore[method-assign]
    for _ in range(62):
        harness.clock.now_s += 1
        harness.engine.poll(0)
    assert len(harness.processes) == 2
    assert caplog.messages[0] == (
        "the engine made no progress for 61 s while it had work (run.engine_timeout_s=60), "
        f"restarting it, see {LOG_PATH}"
    )


@pytest.mark.parametrize("count", ["num_generated_tokens", "num_computed_tokens", "num_cached_tokens"])
def test_an_engine_whose_tokens_grow_in_number_is_not_hung(count: str) -> None:
    harness = SupervisorHarness(lambda rows: None)
    harness.engine.submit([Request(RequestId(0), [1])])
    numbers = iter(range(1000))
    slow = harness.processes[0]
    slow.poll = lambda timeout_s: [EngineStats(**{count: next(numbers) // 50})]  # type: ignore[method-assign]
    for _ in range(500):
        harness.clock.now_s += 1
        harness.engine.poll(0)
    assert len(harness.processes) == 1


def test_a_sequence_preempted_again_and_again_is_no_progress() -> None:
    harness = SupervisorHarness(lambda rows: None)
    harness.engine.submit([Request(RequestId(0), [1])])
    numbers = iter(range(1000))
    thrashing = harness.processes[0]
    thrashing.poll = lambda timeout_s: [  # type: ignore[method-assign]
        EngineStats(5, num_computed_tokens=next(numbers) % 10)
    ]
    for _ in range(80):
        harness.clock.now_s += 1
        harness.engine.poll(0)
    assert len(harness.processes) == 2


def test_an_engine_that_never_loads_is_not_waited_for_forever() -> None:
    clock = FakeClock()
    hung = FakeProcess(EngineSpec("fake", "m"), lambda rows: None)
    hung.load_model = lambda kv_bytes=None: None  # type: ignore[method-assign]
    supervisor = EngineSupervisor(lambda spec: hung, EngineSpec("fake", "m"), LIMITS, clock=clock)

    def wait() -> None:
        clock.now_s += 1

    supervisor.check_options(wait)
    clock.now_s += 5000  # meanwhile the input is read
    began_s = clock.now_s
    with pytest.raises(EngineError) as raised:
        supervisor.load_model(lambda measured: measured, wait)
    assert str(raised.value) == (
        f"the engine sent no message for 601 s while it was starting (run.engine_start_timeout_s=600), see {LOG_PATH}"
    )
    assert clock.now_s - began_s == 601


@pytest.mark.parametrize("num_waits", [0, 1, 2, 3])
def test_loading_continues_where_another_ranks_failure_interrupted_the_wait(num_waits: int) -> None:
    calls: list[str] = []

    class RecordingProcess(FakeProcess):
        def load_model(self, kv_bytes: int | None = None) -> None:
            calls.append("load_model")
            super().load_model(kv_bytes)

        def set_kv_bytes(self, num_bytes: int) -> None:
            calls.append(f"set_kv_bytes({num_bytes})")
            super().set_kv_bytes(num_bytes)

    def agree_kv(measured: int) -> int:
        if num_waits == 3 and "agree_kv" not in calls:
            calls.append("agree_kv")
            raise InterruptedError
        calls.append("agree_kv")
        return 5000

    def wait() -> None:
        if next(waits) == num_waits:
            raise InterruptedError

    waits = iter(range(4))
    spec = EngineSpec("fake", "m")
    engine = EngineSupervisor(lambda spec: RecordingProcess(spec, lambda rows: None), spec, LIMITS, clock=FakeClock())
    with pytest.raises(InterruptedError):
        engine.load_model(agree_kv, wait)
    assert not engine.is_ready and engine.max_num_seqs == 0
    assert engine.load_model(agree_kv, lambda: None).max_num_seqs == engine.max_num_seqs == 8
    num_agreements = 2 if num_waits == 3 else 1
    assert calls == ["load_model", *["agree_kv"] * num_agreements, "set_kv_bytes(1000)"], "at most what is free"


def test_an_engine_that_has_begun_to_load_is_only_waited_for() -> None:
    harness = StartHarness(None)
    harness.engine.begin_loading()
    harness.engine.begin_loading()  # a stage that is repeated where ranks are lost
    harness.load()
    [process] = harness.processes
    assert harness.engine.is_ready and process.num_loads == 1


def test_an_engine_that_dies_while_the_input_is_read_is_started_again_and_loads() -> None:
    class DyingProcess(FakeProcess):
        def poll(self, timeout_s: float) -> list[Event]:
            events, self._events = self._events[:1], []
            if not events:
                raise EngineError(OOM)
            return events

    processes: list[FakeProcess] = []

    def start(spec: EngineSpec) -> FakeProcess:
        processes.append((FakeProcess if processes else DyingProcess)(spec, lambda rows: None))
        return processes[-1]

    engine = EngineSupervisor(start, EngineSpec("fake", "m"), LIMITS, clock=FakeClock())
    engine.begin_loading()
    assert engine.check_options(lambda: None) == ()
    engine.load_model(lambda measured: measured, lambda: None)
    assert engine.is_ready and [process.num_loads for process in processes] == [1, 1]


def test_an_engine_that_still_loads_is_killed_where_the_rank_needs_it_no_more() -> None:
    harness = StartHarness(None)
    harness.engine.begin_loading()
    harness.engine.stop()
    [process] = harness.processes
    assert process.killed and not process.stopped, "it reads no message while it loads"


STILL_HELD = (
    "Free memory on device cuda:0 (68.77/139.8 GiB) on startup is less than desired GPU memory utilization (0.9, "
    "125.82 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
TOO_LONG = "16 GiB KV cache is needed, which is larger than the available KV cache memory (3 GiB)"


KILLED = EngineError("the engine process was killed by SIGKILL", signal=signal.SIGKILL)


class StartHarness:
    """A supervisor whose lives fail to load, each for the next cause of a list; None is a life that loads."""

    def __init__(
        self, *causes: str | EngineError | None, options: dict[str, Any] | None = None, weight_bytes: int = 0
    ) -> None:
        self.clock = FakeClock()
        self.processes: list[FakeProcess] = []
        self._causes = list(causes)
        spec = EngineSpec("fake", "m", dict(options or {}), weight_bytes=weight_bytes)
        limits = dataclasses.replace(LIMITS, start_retry_s=1.0)
        self.engine = EngineSupervisor(self._start, spec, limits, clock=self.clock)

    def _start(self, spec: EngineSpec) -> FakeProcess:
        process = FakeProcess(spec, lambda rows: None)
        cause = self._causes.pop(0)
        if cause is not None:

            def fail(kv_bytes: int | None = None) -> None:
                raise EngineError(cause) if isinstance(cause, str) else cause

            process.load_model = fail  # type: ignore[method-assign]
        self.processes.append(process)
        return process

    def load(self) -> None:
        self.engine.check_options(self._wait)
        self.engine.load_model(lambda measured: measured, self._wait)

    def _wait(self) -> None:
        self.clock.now_s += 0.25


def test_a_start_that_fails_is_tried_again_twice(caplog: pytest.LogCaptureFixture) -> None:
    harness = StartHarness("no such device", "no such device", None)
    harness.load()
    assert harness.engine.max_num_seqs == 8 and len(harness.processes) == 3
    assert all(process.killed for process in harness.processes[:2])
    assert caplog.messages == ["no such device, retrying its start-up in 1 s"] * 2
    assert harness.clock.now_s >= 2


def test_an_engine_that_dies_while_it_checks_its_options_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    def die(timeout_s: float) -> list[Event]:
        raise KILLED

    harness = StartHarness(None, None)
    harness.processes[0].poll = die  # type: ignore[method-assign]
    assert harness.engine.check_options(lambda: None) == ()
    assert len(harness.processes) == 2 and harness.processes[0].killed
    assert caplog.messages == ["the engine process was killed by SIGKILL, retrying its start-up"]


def test_an_option_that_the_engine_rejects_is_an_error_in_the_configuration() -> None:
    harness = StartHarness(None)
    harness.processes[0]._events = [OptionsChecked("no such option: max_seqs")]
    with pytest.raises(ConfigError, match="no such option: max_seqs"):
        harness.engine.check_options(lambda: None)
    harness = StartHarness(None)
    harness.processes[0]._events = [OptionsChecked(notes=("a note",))]
    assert harness.engine.check_options(lambda: None) == ("a note",)


def test_a_start_that_fails_three_times_ends_the_run_with_the_cause() -> None:
    harness = StartHarness(*["no such device"] * 3)
    with pytest.raises(EngineError, match="no such device") as raised:
        harness.load()
    assert raised.value.exit_status == 1
    shown = [process.has_shown_errors for process in harness.processes]
    assert shown == [False, False, True], "what the engine logged of a start that is tried again is held back"


def test_an_engine_that_lacks_memory_to_start_is_started_with_half_of_its_own_sequences() -> None:
    harness = StartHarness(OOM, None)
    harness.processes[0]._events = [OptionsChecked(max_num_seqs=1024)]
    harness.load()
    assert harness.processes[1].spec.options == {"max_num_seqs": 512}, "vLLM's default depends on the GPU"


def test_an_engine_that_is_killed_at_every_start_ends_the_run_resumable(caplog: pytest.LogCaptureFixture) -> None:
    harness = StartHarness(*[KILLED] * LIMITS.max_deaths)
    with pytest.raises(EngineError, match="killed by SIGKILL") as raised:
        harness.load()
    assert raised.value.exit_status == 75
    assert len(harness.processes) == harness.engine.num_deaths == LIMITS.max_deaths
    retries = ["the engine process was killed by SIGKILL, retrying its start-up"] * (LIMITS.max_deaths - 1)
    assert caplog.messages == retries, "none of them waits"


def test_deaths_at_the_start_do_not_count_once_the_engine_is_loaded() -> None:
    harness = StartHarness(*[KILLED] * (LIMITS.max_deaths - 1), *[None] * LIMITS.max_deaths)
    harness.load()
    harness.engine.submit([Request(RequestId(0), [1])])
    while not harness.engine.is_abandoned:
        harness.processes[-1]._find_cause = lambda rows: "dead"
        harness.engine.poll(0)
    assert harness.engine.num_deaths == 2 * LIMITS.max_deaths - 1


def test_memory_that_an_ended_engine_still_holds_is_waited_for_once_before_the_engine_takes_what_is_free(
    caplog: pytest.LogCaptureFixture,
) -> None:
    harness = StartHarness(STILL_HELD, STILL_HELD, None)
    harness.load()
    assert [process.spec.options for process in harness.processes] == [{}, {}, {"gpu_memory_utilization": 0.48}]
    held = "the engine did not start: only 68.8 of 139.8 GiB are free on cuda:0"
    assert caplog.messages == [
        f"{held}, retrying its start-up in 1 s",
        f"{held}, retrying its start-up with gpu_memory_utilization=0.48, which is what other processes leave",
    ]


def test_of_several_devices_the_fullest_decides_and_less_is_taken_where_even_more_is_held_at_the_next_start() -> None:
    worker_failed = EngineError(
        "the engine failed: Exception: WorkerProc initialization failed",
        output=[STILL_HELD, STILL_HELD.replace("68.77", "41.0").replace("cuda:0", "cuda:1"), "later"],
    )
    harness = StartHarness(worker_failed, worker_failed, STILL_HELD.replace("68.77", "30.0"), None)
    harness.load()
    assert [process.spec.options.get("gpu_memory_utilization") for process in harness.processes] == [
        None,
        None,
        0.28,
        0.2,
    ]


def test_a_memory_limit_of_the_user_is_kept_and_the_error_says_what_to_write() -> None:
    harness = StartHarness(*[STILL_HELD] * 3, options={"gpu_memory_utilization": 0.9})
    with pytest.raises(
        EngineError, match=r"free on cuda:0, set engine\.gpu_memory_utilization=0\.48 or lower$"
    ) as raised:
        harness.load()
    assert {process.spec.options["gpu_memory_utilization"] for process in harness.processes} == {0.9}
    assert raised.value.exit_status == 75, "the memory may be free later"


@pytest.mark.parametrize(
    ("free_gib", "reason"),
    [("68.77", "and the weights alone take 70.0 GiB"), ("0.5", "and the weights alone take 70.0 GiB")],
)
def test_an_engine_whose_weights_do_not_fit_into_what_is_free_is_not_started_with_less(
    free_gib: str, reason: str
) -> None:
    harness = StartHarness(*[STILL_HELD.replace("68.77", free_gib)] * 3, weight_bytes=70 << 30)
    with pytest.raises(EngineError, match=f"{reason}: end what else runs on it, or use another device") as raised:
        harness.load()
    assert raised.value.exit_status == 75 and all(not process.spec.options for process in harness.processes)


def test_no_memory_for_the_cache_does_not_lead_to_less_memory() -> None:
    cause = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
    harness = StartHarness(*[cause] * 6)
    harness.engine.memory.kv_bytes = 1000  # as the ranks agreed on
    with pytest.raises(EngineError):
        harness.load()
    assert {process.spec.options.get("gpu_memory_utilization") for process in harness.processes} == {None}
    assert harness.engine.memory.kv_bytes == 1000


def test_a_cache_that_the_configuration_makes_too_small_is_not_tried_again() -> None:
    cause = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
    harness = StartHarness(cause, options={"kv_cache_memory_bytes": 1000})
    with pytest.raises(EngineError, match=r"set a larger engine\.kv_cache_memory_bytes") as raised:
        harness.load()
    assert raised.value.exit_status == 1, "nothing that ends will leave it more"


def test_an_engine_that_steps_with_others_says_what_to_write_at_once() -> None:
    error = EngineError(f"the engine failed: ValueError: {STILL_HELD}", log_path=LOG_PATH)
    assert error.summarize() == (
        "the engine did not start: only 68.8 of 139.8 GiB are free on cuda:0, set engine.gpu_memory_utilization=0.48 "
        f"or lower, see {LOG_PATH}"
    )


def test_a_context_that_does_not_fit_is_not_tried_again() -> None:
    harness = StartHarness(TOO_LONG)
    with pytest.raises(EngineError, match=r"set a smaller engine\.max_model_len"):
        harness.load()


def test_a_restart_that_fails_is_tried_again_later_and_nobody_waits_for_it(caplog: pytest.LogCaptureFixture) -> None:
    harness = StartHarness(None, "busy", None)
    harness.load()
    harness.engine.submit([Request(RequestId(0), [1])])
    harness.processes[0]._find_cause = lambda rows: "dead"
    for _ in range(3):
        harness.engine.poll(0)
    assert len(harness.processes) == 2 and caplog.messages[-1] == "busy, restarting it in 1 s"
    harness.clock.now_s += 1
    events = [event for _ in range(4) for event in harness.engine.poll(0)]
    assert len(harness.processes) == 3 and any(isinstance(event, RowsFinished) for event in events)


@pytest.mark.parametrize(
    ("cause", "change"),
    [
        (KILLED, ""),
        (EngineError(OOM), " with max_num_seqs=4 (engine.max_num_seqs=4 keeps this for later attempts)"),
    ],
    ids=["killed", "out of memory"],
)
def test_a_restart_that_is_killed_or_lacks_memory_is_tried_again_at_once(
    caplog: pytest.LogCaptureFixture, cause: EngineError, change: str
) -> None:
    harness = StartHarness(None, cause, None)
    harness.load()
    harness.engine.submit([Request(RequestId(0), [1])])
    harness.processes[0]._find_cause = lambda rows: "dead"
    events = [event for _ in range(6) for event in harness.engine.poll(0)]
    assert any(isinstance(event, RowsFinished) for event in events)
    assert caplog.messages[1] == f"{cause.cause}, restarting it{change}"


def test_an_engine_that_may_start_later_ends_the_run_resumable() -> None:
    assert EngineError("killed", signal=signal.SIGKILL).exit_status == 75
    assert EngineError(OOM).exit_status == EngineError("OSError: Address already in use").exit_status == 75
    assert EngineError("no such device").exit_status == 1


def test_an_idle_engine_may_be_silent() -> None:
    harness = SupervisorHarness(lambda rows: None)
    harness.run(range(1), num_polls=500)
    assert sorted(harness.run(range(1, 3))) == [1, 2]
    assert len(harness.processes) == 1


def test_out_of_memory_restarts_with_lower_limits_and_blames_no_row(caplog: pytest.LogCaptureFixture) -> None:
    specs: list[EngineSpec] = []

    def die(rows: set[int]) -> str | None:
        specs[:] = [process.spec for process in harness.processes]
        return OOM if specs[-1].options.get("max_num_seqs", 8) > 2 else None

    harness = SupervisorHarness(die)
    results = harness.run(range(10))
    assert sorted(results) == list(range(10)) and not any(result.error for result in results.values())
    assert [spec.options.get("max_num_seqs") for spec in specs] == [None, 4, 2]
    keep = "(engine.max_num_seqs=2 keeps this for later attempts)"
    assert f"{OOM}, restarting it with max_num_seqs=2 {keep}, see {LOG_PATH}" in caplog.messages


def test_an_engines_last_lines_stand_below_what_happened(caplog: pytest.LogCaptureFixture) -> None:
    def die(rows: set[int]) -> str | None:
        if len(harness.processes) == 1:
            raise EngineError("the engine process exited with status 1", log_path=LOG_PATH, last_lines=["one", "two"])
        return None

    harness = SupervisorHarness(die)
    harness.run(range(1))
    assert caplog.messages[0] == (
        f"the engine process exited with status 1, restarting it, see {LOG_PATH}, its last lines:\n    one\n    two"
    )
