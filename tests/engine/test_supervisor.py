"""The supervisor alone: blame, restarts and giving up, with processes that do as they are told."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from dpgen.engine.messages import (
    EngineInfo,
    EngineReady,
    EngineSpec,
    EngineTextConfig,
    Event,
    KvBytesMeasured,
    OptionsChecked,
    RowsFinished,
)
from dpgen.engine.supervisor import EngineSupervisor
from dpgen.errors import EngineError
from dpgen.records import Completion, Request, RowResult

OOM = "the engine failed: OutOfMemoryError: CUDA out of memory"


class FakeProcess:
    """Answers at once; `dies(rows)` says whether, and of what, it dies on the rows it was given."""

    def __init__(self, spec: EngineSpec, dies: Callable[[set[int]], str | None]) -> None:
        self.spec, self._dies = spec, dies
        self._events: list[Event] = [OptionsChecked()]
        self._rows: list[int] = []
        self.kv_bytes: int | None = None
        self.killed = False

    def load_model(self, text: EngineTextConfig, kv_bytes: int | None = None) -> None:
        if kv_bytes is None:
            self._events.append(KvBytesMeasured(1000))
        else:
            self._become_ready(kv_bytes)

    def set_kv_bytes(self, num_bytes: int) -> None:
        self._become_ready(num_bytes)

    def _become_ready(self, kv_bytes: int) -> None:
        self.kv_bytes = kv_bytes
        self._events.append(EngineReady(EngineInfo(self.spec.options.get("max_num_seqs", 8), 100, kv_bytes, 1)))

    def submit(self, requests: list[Request]) -> None:
        self._rows += [request.row for request in requests]

    def poll(self, timeout_s: float) -> list[Event]:
        if self._events:
            events, self._events = self._events, []
            return events
        if self._rows:
            cause = self._dies(set(self._rows))
            if cause is not None:
                raise EngineError(cause)
            rows, self._rows = self._rows, []
            return [RowsFinished([RowResult(row, 1, (Completion("x", "stop", 1),)) for row in rows])]
        return []

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self.killed = True

    def kill(self) -> None:
        self.killed = True


class SupervisorHarness:
    def __init__(self, dies: Callable[[set[int]], str | None], **settings: Any) -> None:
        self.now = 0.0
        self.said: list[str] = []
        self.processes: list[FakeProcess] = []

        def start(spec: EngineSpec) -> FakeProcess:
            self.processes.append(FakeProcess(spec, dies))
            return self.processes[-1]

        defaults: dict[str, Any] = {"timeout_s": 60.0, "start_timeout_s": 600.0, "max_deaths": 8}
        self.engine = EngineSupervisor(
            start, EngineSpec("fake", "m"), self.said.append, clock=lambda: self.now, **{**defaults, **settings}
        )
        self.engine.check_options(lambda: None)
        self.engine.load_model(lambda measured: measured - 100, lambda: None)

    def run(self, rows: range, polls: int = 200) -> dict[int, RowResult]:
        self.engine.submit([Request(row, [1]) for row in rows])
        found: dict[int, RowResult] = {}
        for _ in range(polls):
            for event in self.engine.poll(0):
                assert isinstance(event, RowsFinished)
                for result in event.results:
                    assert result.row not in found, "a row is finished once"
                    found[result.row] = result
            self.now += 1
        return found


def test_a_dead_engines_rows_go_to_its_successor_with_the_agreed_kv_size() -> None:
    deaths = iter(["killed", *[None] * 100])
    rig = SupervisorHarness(lambda rows: next(deaths))
    found = rig.run(range(10))
    assert sorted(found) == list(range(10)) and not any(result.error for result in found.values())
    assert [process.kv_bytes for process in rig.processes] == [900, 900]
    assert rig.processes[0].killed, "the first one's process tree is ended"


@pytest.mark.parametrize("poison", [{3}, {0, 9}])
def test_a_poison_row_is_found_recorded_and_costs_no_other_row(poison: set[int]) -> None:
    rig = SupervisorHarness(lambda rows: "the engine process was ended by SIGSEGV" if rows & poison else None)
    found = rig.run(range(10))
    assert sorted(found) == list(range(10))
    assert {row for row, result in found.items() if result.error} == poison
    for row in poison:
        error = found[row].error
        assert error is not None and error.type == "poison_row" and "SIGSEGV" in error.message
    assert not rig.engine.is_abandoned


def test_a_row_is_not_blamed_for_a_kill_from_outside() -> None:
    deaths = iter([*[signal.SIGKILL] * 5, *[None] * 100])

    def dies(rows: set[int]) -> str | None:
        number = next(deaths)
        if number is not None:
            raise EngineError("the engine process was ended by SIGKILL", signal=number)
        return None

    found = SupervisorHarness(dies).run(range(1))
    assert found[0].error is None


def test_rows_in_flight_at_one_death_are_not_suspected() -> None:
    deaths = iter(["killed", *[None] * 100])
    rig = SupervisorHarness(lambda rows: next(deaths))
    rig.run(range(10))
    assert len(rig.processes) == 2, "nobody was tried alone"


def test_an_engine_that_never_comes_back_is_given_up() -> None:
    rig = SupervisorHarness(lambda rows: "dead on arrival" if len(rows) else None, max_deaths=2)
    found = rig.run(range(3))
    assert rig.engine.is_abandoned and not found
    assert rig.engine.max_num_seqs == 0
    assert "given up after 2 deaths in a row" in rig.said[-1]


def test_a_silent_engine_with_work_counts_as_hung() -> None:
    rig = SupervisorHarness(lambda rows: None, timeout_s=60)
    rig.engine.submit([Request(0, [1])])
    silent = rig.processes[0]
    silent.poll = lambda timeout_s: []  # type: ignore[method-assign]
    for _ in range(61):
        rig.now += 1
        assert rig.engine.poll(0) == []
    assert len(rig.processes) == 2 and "said nothing for 61 s while it had work" in rig.said[0]
    assert sorted(rig.run(range(1, 3))) == [0, 1, 2]


def test_an_engine_that_never_loads_is_not_waited_for_for_ever() -> None:
    rig = SupervisorHarness(lambda rows: None, start_timeout_s=600)
    hung = FakeProcess(EngineSpec("fake", "m"), lambda rows: None)
    hung.load_model = lambda text, kv_bytes=None: None  # type: ignore[method-assign]
    supervisor = EngineSupervisor(
        lambda spec: hung,
        EngineSpec("fake", "m"),
        rig.said.append,
        timeout_s=60,
        start_timeout_s=600,
        max_deaths=8,
        clock=lambda: rig.now,
    )

    def wait() -> None:
        rig.now += 1

    supervisor.check_options(wait)
    rig.now += 5000  # the input is read
    began_s = rig.now
    with pytest.raises(
        EngineError, match=r"said nothing for 601 s while it was starting \(run.engine_start_timeout_s\)"
    ):
        supervisor.load_model(lambda measured: measured, wait)
    assert rig.now - began_s == 601


def test_an_idle_engine_may_be_silent() -> None:
    rig = SupervisorHarness(lambda rows: None, timeout_s=60)
    rig.run(range(1), polls=500)
    assert sorted(rig.run(range(1, 3))) == [1, 2]
    assert len(rig.processes) == 1


def test_out_of_memory_goes_on_with_less_and_blames_no_row() -> None:
    limit = [8]

    def dies(rows: set[int]) -> str | None:
        size = rig.processes[-1].spec.options.get("max_num_seqs", 8)
        return OOM if size > limit[0] // 4 else None

    rig = SupervisorHarness.__new__(SupervisorHarness)
    rig.__init__(dies)  # type: ignore[misc]
    found = rig.run(range(10))
    assert sorted(found) == list(range(10)) and not any(result.error for result in found.values())
    assert [process.spec.options.get("max_num_seqs") for process in rig.processes] == [None, 4, 2]
    assert "going on with max_num_seqs=2" in rig.said[-2]
