"""Blame alone, over a simulated engine: how many deaths a poison row costs, and what counts as a witness."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from dpgen.engine.blame import BlameTracker
from dpgen.errors import EngineError
from dpgen.records import Completion, Request, RequestId, RowError, RowResult

RAISED = EngineError("the engine failed: RuntimeError: boom")
KILLED = EngineError("the engine process was killed by SIGKILL", signal=signal.SIGKILL)
OUT_OF_MEMORY = EngineError("the engine failed: OutOfMemoryError: CUDA out of memory")


class SimulatedEngine:
    """Run batches of a `BlameTracker` until nothing is left, or it finds the engine sick, or the deaths run out.

    Args:
        find_cause: returns what the engine dies of with these rows, or None. Otherwise it finishes all of them.

    Attributes:
        batches: rows of each batch, the canary included.
        num_deaths_in_a_row: the largest number of deaths without a finished row between them.
    """

    def __init__(self, find_cause: Callable[[set[int]], EngineError | None], max_deaths: int = 100) -> None:
        self.blame = BlameTracker()
        self._find_cause, self._max_deaths = find_cause, max_deaths
        self.batches: list[set[int]] = []
        self.results: dict[int, RowResult] = {}
        self.num_deaths = self.num_deaths_in_a_row = self._streak = self._num_rows = 0

    @property
    def poison(self) -> set[int]:
        return {row for row, result in self.results.items() if result.error is not None}

    def run(self, num_rows: int, first: int = 0) -> None:
        self.blame.add(Request(RequestId(row), [1]) for row in range(first, first + num_rows))
        self._num_rows += num_rows
        while self.num_deaths < self._max_deaths and not self.blame.sickness:
            self._check_counts()
            batch = [request.row for request in self.blame.take_batch()]
            self._check_counts()
            assert self.blame.is_busy == bool(batch)
            if not batch:
                assert self.blame.num_unfinished == 0, "rows are left that nobody runs"
                return
            self.batches.append(set(batch))
            cause = self._find_cause(set(batch))
            if cause is not None:
                self.blame.record_death(cause)
                self.num_deaths += 1
                self._streak += 1
                self.num_deaths_in_a_row = max(self._streak, self.num_deaths_in_a_row)
                continue
            self._streak = 0
            for row in batch:
                self._finish(row)

    def _check_counts(self) -> None:
        assert self.blame.num_unfinished == self._num_rows - len(self.results), "a row is in one place"

    def _finish(self, row: int) -> None:
        results = [RowResult(row, 1, (Completion("x", "stop", 1),))]
        if self.blame.finish(results[0]) is None:
            results = []
        for result in [*results, *self.blame.take_verdicts()]:
            assert result.row not in self.results, "a row gets one result"
            self.results[result.row] = result


def dies_of(poison: set[int], cause: EngineError = RAISED) -> Callable[[set[int]], EngineError | None]:
    return lambda rows: cause if rows & poison else None


@pytest.mark.parametrize("poison", [0, 100, 143, 144, 287])
def test_one_poison_row_among_288_costs_about_ten_deaths(poison: int) -> None:
    engine = SimulatedEngine(dies_of({poison}))
    engine.run(288)
    assert engine.poison == {poison} and len(engine.results) == 288
    assert engine.num_deaths <= 2 + 1 + 10, "two deaths, the group of suspects, and one for each halving"
    assert engine.num_deaths_in_a_row <= 4, "a half that survives comes between"


@pytest.mark.parametrize("cause", [RAISED, KILLED])
@pytest.mark.parametrize("poison", [{0}, {31}, {0, 1}, {3, 17, 30}])
def test_every_poison_row_is_found_and_no_other(poison: set[int], cause: EngineError) -> None:
    engine = SimulatedEngine(dies_of(poison, cause))
    engine.run(32)
    assert engine.poison == poison and len(engine.results) == 32
    assert engine.num_deaths_in_a_row < 8, "the default of run.max_engine_deaths"


def test_kills_from_outside_isolate_no_row() -> None:
    deaths = iter([KILLED, KILLED, KILLED, *[None] * 100])
    engine = SimulatedEngine(lambda rows: next(deaths))
    engine.run(256)
    assert engine.batches == [set(range(256))] * 4, "all rows run together again"
    assert not engine.poison


def test_a_lone_row_is_blamed_for_kills_only_after_four() -> None:
    def find_cause(rows: set[int]) -> EngineError | None:
        return KILLED if 7 in rows and kills_left.pop() else None

    kills_left = [False] + [True] * 4
    engine = SimulatedEngine(dies_of(set()))
    engine.run(7)
    engine._find_cause = find_cause
    engine.run(1, first=7)
    assert engine.poison == {7} and engine.num_deaths == 4


def test_kills_of_a_suspect_that_is_alone_count_only_from_the_fourth() -> None:
    causes = iter([None, RAISED, RAISED, *[KILLED] * 4, None])
    engine = SimulatedEngine(lambda rows: next(causes))
    engine.run(1)
    engine.run(1, first=1)
    assert engine.batches == [{0}, *[{1}] * 6, {0}], "the canary runs once the row is held"
    assert engine.poison == {1}


def test_kills_in_the_company_of_other_rows_do_not_count_against_a_row_that_is_alone() -> None:
    causes = iter([None, *[KILLED] * 5, None, None])
    engine = SimulatedEngine(lambda rows: next(causes))
    engine.run(1)
    engine.run(2, first=1)
    assert engine.batches == [{0}, *[{1, 2}] * 4, {1}, {1}, {2}]
    assert not engine.poison


@pytest.mark.parametrize("cause", [RAISED, KILLED, OUT_OF_MEMORY])
def test_the_death_of_an_idle_engine_blames_no_row(cause: EngineError) -> None:
    engine = SimulatedEngine(dies_of(set()))
    for _ in range(4):
        engine.blame.record_death(cause)
    engine.run(2)
    assert engine.batches == [{0, 1}] and not engine.poison and not engine.blame.sickness


def test_a_canary_that_is_rejected_is_no_witness_and_other_rejected_rows_change_nothing() -> None:
    engine = SimulatedEngine(dies_of({2}), max_deaths=3)
    engine.run(1)
    blame = engine.blame
    blame.add([Request(RequestId(1), [1])])
    blame.take_batch()
    blame.finish(RowResult(1, error=RowError("prompt_too_long", "too long")))
    assert blame.canary is not None and blame.canary.row == 0
    blame.add([Request(RequestId(2), [1])])
    for _ in range(3):
        assert [request.row for request in blame.take_batch()] == [2]
        blame.record_death(RAISED)
    assert [request.row for request in blame.take_batch()] == [0]
    assert blame.finish(RowResult(0, error=RowError("prompt_too_long", "too long"))) is None
    assert blame.canary is None and blame.take_verdicts() == []
    assert [request.row for request in blame.take_batch()] == [2], "it is held until another row is finished"


def test_nothing_joins_the_trial_of_a_row_that_is_held() -> None:
    engine = SimulatedEngine(dies_of({0}), max_deaths=3)
    engine.run(1)
    [held] = engine.blame.take_batch()
    engine.blame.add([Request(RequestId(1), [1])])
    assert held.row == 0 and engine.blame.take_batch() == []
    engine.blame.record_death(RAISED)
    assert [request.row for request in engine.blame.take_batch()] == [1], "it is held again"


def test_running_out_of_memory_blames_no_row() -> None:
    deaths = iter([OUT_OF_MEMORY] * 5)
    engine = SimulatedEngine(lambda rows: next(deaths, None))
    engine.run(8)
    assert engine.batches == [set(range(8))] * 6 and not engine.poison


def test_rows_that_were_in_flight_when_memory_ran_out_go_first_again_and_suspects_without_other_rows() -> None:
    blame = BlameTracker()
    blame.add([Request(RequestId(0), [1]), Request(RequestId(1), [1])])
    blame.take_batch()
    blame.add([Request(RequestId(2), [1])])
    blame.record_death(OUT_OF_MEMORY)
    assert [request.row for request in blame.take_batch()] == [0, 1, 2]
    for _ in range(2):
        blame.record_death(RAISED)
        suspects = blame.take_batch()
    blame.add([Request(RequestId(3), [1])])
    blame.record_death(OUT_OF_MEMORY)
    assert blame.take_batch() == suspects and len(suspects) == 3
    assert blame.take_batch() == [], "nothing joins a trial"


def test_the_shortest_finished_row_is_the_canary_its_prompt_included() -> None:
    blame = BlameTracker()
    blame.add(Request(RequestId(row), [1]) for row in range(4))
    blame.take_batch()
    for row, (num_prompt, num_generated) in enumerate([(5, 5), (3, 6), (8, 1), (1, 9)]):
        blame.finish(RowResult(row, num_prompt, (Completion("x", "stop", num_generated),)))
    assert blame.canary is not None and blame.canary.row == 1, "the first of those with 9 tokens"


def test_a_verdict_follows_the_canary_whose_result_is_dropped() -> None:
    engine = SimulatedEngine(dies_of({5}))
    engine.run(4)
    engine.run(4, first=4)
    assert engine.poison == {5} and len(engine.results) == 8
    row_alone = engine.batches.index({5})
    assert engine.batches[row_alone + 1] == {0}, "a finished row runs again before the verdict"


def test_an_engine_that_dies_of_its_canary_is_sick_and_blames_nobody() -> None:
    is_sick = False
    engine = SimulatedEngine(lambda rows: RAISED if is_sick else None)
    engine.run(4)
    is_sick = True
    engine.run(1, first=4)
    assert engine.blame.sickness == "3 deaths on a row that had succeeded before"
    assert not engine.poison and engine.blame.num_unfinished == 1
    assert engine.num_deaths == 3 + 3


def test_a_row_that_died_while_the_engine_was_sick_gets_another_trial() -> None:
    causes = iter([None, *[RAISED] * 3, RAISED, None, None])  # the row alone, then its canary; then all is well
    engine = SimulatedEngine(lambda rows: next(causes))
    engine.run(1)
    engine.run(1, first=1)
    assert engine.batches == [{0}, {1}, {1}, {1}, {0}, {0}, {1}]
    assert not engine.poison and len(engine.results) == 2


def test_an_engine_that_has_finished_nothing_gives_no_verdict() -> None:
    engine = SimulatedEngine(lambda rows: RAISED)
    engine.run(4)
    assert engine.blame.sickness == "3 rows killed it one by one and none was finished"
    assert not engine.results and engine.blame.num_unfinished == 4


def test_a_row_held_alone_is_tried_again_until_the_deaths_run_out() -> None:
    engine = SimulatedEngine(lambda rows: RAISED, max_deaths=8)
    engine.run(1)
    assert engine.batches == [{0}] * 8 and not engine.results
    assert engine.num_deaths_in_a_row == 8, "run.max_engine_deaths ends it"


def test_a_row_that_succeeded_in_an_earlier_attempt_is_the_canary_where_only_poison_is_left() -> None:
    engine = SimulatedEngine(lambda rows: RAISED if rows & {0, 1} else None)
    engine.blame.find_canary = lambda: Request(RequestId(77), [1])
    engine.run(2)
    assert engine.poison == {0, 1} and not engine.blame.sickness
    assert {77} in engine.batches and 77 not in engine.results
    sick = SimulatedEngine(lambda rows: RAISED)
    sick.blame.find_canary = lambda: Request(RequestId(77), [1])
    sick.run(2)
    assert sick.blame.sickness == "3 deaths on a row that had succeeded before" and not sick.poison
    assert sick.batches == [{0, 1}] * 3 + [{0}] + [{77}] * 3


def test_a_held_row_becomes_poison_once_another_row_is_finished() -> None:
    engine = SimulatedEngine(dies_of({0}), max_deaths=3)
    engine.run(1)
    assert not engine.results and engine.num_deaths == 3
    engine._max_deaths = 100
    engine.run(1, first=1)
    assert engine.poison == {0} and set(engine.results) == {0, 1}


def test_the_last_row_of_a_group_was_not_alone() -> None:
    blame = BlameTracker()
    blame.add([Request(RequestId(0), [1]), Request(RequestId(1), [1])])
    for _ in range(2):
        blame.take_batch()
        blame.record_death(RAISED)
    assert [request.row for request in blame.take_batch()] == [0, 1]
    blame.finish(RowResult(0, 1, (Completion("x", "stop", 1),)))
    blame.record_death(RAISED)
    assert [request.row for request in blame.take_batch()] == [1], "first a trial of its own, then the canary"


def test_a_rejected_row_is_no_witness() -> None:
    engine = SimulatedEngine(dies_of({0}), max_deaths=3)
    engine.run(1)
    engine.blame.add([Request(RequestId(1), [1])])
    assert [request.row for request in engine.blame.take_batch()] == [1]
    engine.blame.finish(RowResult(1, error=RowError("prompt_too_long", "too long")))
    assert engine.blame.take_verdicts() == [] and engine.blame.canary is None


def test_all_requests_for_a_poison_row_get_its_verdict() -> None:
    blame = BlameTracker()
    samples = [RequestId(5, sample=sample, attempt=1) for sample in (0, 2)]
    blame.add(Request(id, [1]) for id in samples)
    for _ in range(3):
        assert [request.id for request in blame.take_batch()] == samples, "a row is tried with all of its requests"
        blame.record_death(RAISED)
    blame.add([Request(RequestId(6), [1])])
    assert [request.row for request in blame.take_batch()] == [6]
    blame.finish(RowResult(6, 1, (Completion("x", "stop", 1),)))
    assert [verdict.id for verdict in blame.take_verdicts()] == samples
    assert blame.num_unfinished == 0
