"""Blame from one attempt to the next, where an engine's death ends all ranks: who is blamed, and after how many."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from dpgen.engine.blame import BlameTracker, judge_notes
from dpgen.errors import EngineError
from dpgen.journal.engine_notes import BlameState, EngineDeath, EngineNote
from dpgen.records import Completion, Request, RequestId, RowResult

RAISED = EngineError("the engine failed: RuntimeError: boom")
PEER_GONE = EngineError("the engine failed: RuntimeError: Connection closed by peer")
KILLED = EngineError("the engine process was killed by SIGKILL", signal=signal.SIGKILL)


class SimulatedJob:
    """Run attempts of two engines in lockstep, until all rows have results or `max_attempts` have been made.

    Args:
        find_cause: returns what an engine dies of while the engines have these rows, or None.
        width: rows that each of them gets at a time.

    Attributes:
        batches: rows of both engines at a time, canaries included, by attempt.
    """

    def __init__(self, find_cause: Callable[[set[int]], EngineError | None], num_rows: int, width: int = 16) -> None:
        self._find_cause, self._width = find_cause, width
        self._remaining = set(range(num_rows))
        self.state = BlameState()
        self.batches: list[list[set[int]]] = []
        self.poison: set[int] = set()
        self.finished: set[int] = set()

    def run(self, max_attempts: int = 40) -> None:
        while self._remaining and len(self.batches) < max_attempts:
            self.batches.append([])
            self._run_attempt()

    def _run_attempt(self) -> None:
        trackers = [BlameTracker(), BlameTracker()]
        trackers[0].recall(self.state)
        for tracker in trackers:
            tracker.find_canary = lambda: Request(RequestId(min(self.finished)), [1]) if self.finished else None
        suspects = {row for group in self.state.groups for row in group}.union(dict(self.state.held))
        trackers[0].add(Request(RequestId(row), [1]) for row in sorted(suspects & self._remaining))
        while self._remaining:
            if not any(tracker.num_unfinished for tracker in trackers):
                rows = sorted(self._remaining)[: 2 * self._width]
                for rank, tracker in enumerate(trackers):
                    tracker.add(Request(RequestId(row), [1]) for row in rows[rank::2])
            batches = [[request.row for request in tracker.take_batch()] for tracker in trackers]
            running = {row for batch in batches for row in batch}
            self.batches[-1].append(running)
            if (cause := self._find_cause(running)) is not None:
                causes = [cause, None if cause.is_external_kill else PEER_GONE]
                self.state = judge_notes([make_note(*end) for end in zip((0, 1), causes, trackers, strict=True)])
                return
            for tracker, batch in zip(trackers, batches, strict=True):
                self._finish(tracker, batch)

    def _finish(self, tracker: BlameTracker, batch: list[int]) -> None:
        for row in batch:
            if tracker.finish(succeed(row)) is not None:
                self.finished.add(row)
        self.poison |= {result.row for result in tracker.take_verdicts()}
        self._remaining -= self.finished | self.poison


def succeed(row: int) -> RowResult:
    return RowResult(row, 1, (Completion("x", "stop", 1),))


def make_note(rank: int, cause: EngineError | None, tracker: BlameTracker, turn: int | None = None) -> EngineNote:
    death = None if cause is None else EngineDeath.from_error(cause)
    return EngineNote(1, rank, 0, 2, rank + 1 if turn is None else turn, death, tracker.save())


def make_tracker(*rows: int) -> BlameTracker:
    """Return a tracker whose engine has these rows."""
    tracker = BlameTracker()
    tracker.add(Request(RequestId(row), [1]) for row in rows)
    tracker.take_batch()
    return tracker


def dies_of(poison: set[int]) -> Callable[[set[int]], EngineError | None]:
    return lambda rows: RAISED if rows & poison else None


@pytest.mark.parametrize("poison", [{0}, {17}, {31}, {40}, {3, 50}])
def test_each_row_that_kills_the_engines_is_found_by_halves_and_no_other(poison: set[int]) -> None:
    job = SimulatedJob(dies_of(poison), 64)
    job.run()
    assert job.poison == poison and job.finished == set(range(64)) - poison
    assert len(job.batches) <= 1 + len(poison) * (2 + 5), "two deaths, and one for each halving of the 32 rows"


def test_a_row_that_kills_the_engines_is_found_although_no_row_has_succeeded_before() -> None:
    job = SimulatedJob(dies_of({1}), 4)
    job.run()
    assert job.poison == {1} and job.finished == {0, 2, 3}


def test_suspects_run_without_rows_of_other_engines_beside_them() -> None:
    job = SimulatedJob(dies_of({0}), 8)
    job.run()
    first_batches = [batches[0] for batches in job.batches[:4]]
    assert first_batches == [set(range(8)), set(range(8)), {0, 2, 4, 6}, {1, 3, 5, 7}]


def test_a_row_is_tried_alone_once_the_engine_has_shown_that_it_works() -> None:
    job = SimulatedJob(dies_of({9}), 10, width=4)
    job.run()
    alone = next(batches for batches in job.batches if {9} in batches)
    assert len(alone[: alone.index({9})]) >= 1, "another row was finished first"
    assert job.poison == {9}


def test_engines_that_die_of_everything_blame_no_row() -> None:
    num_good = 0

    def find_cause(rows: set[int]) -> EngineError | None:
        nonlocal num_good
        num_good += 1
        return RAISED if 2 < num_good < 30 else None

    job = SimulatedJob(find_cause, 40, width=4)
    job.run()
    assert not job.poison and job.finished == set(range(40)), "a sick GPU, then another node"


def test_engines_that_are_killed_from_outside_blame_no_row() -> None:
    causes = iter([KILLED, KILLED, None, KILLED])
    job = SimulatedJob(lambda rows: next(causes, None), 100)
    job.run()
    assert not job.poison and len(job.finished) == 100
    assert all(len(batches[0]) == 32 for batches in job.batches), "all rows run together again"


def test_a_kill_from_outside_counts_as_one_although_the_other_engines_fail_first() -> None:
    trackers = [make_tracker(1, 2), make_tracker()]
    for _ in range(2):
        state = judge_notes([make_note(0, PEER_GONE, trackers[0]), make_note(1, KILLED, trackers[1])])
        assert state.groups == [] and dict(state.deaths) == {}
        trackers[0].recall(state)
    assert dict(state.kills) == {1: 2, 2: 2}


def test_nobody_is_blamed_if_a_rank_has_left_no_note() -> None:
    state = judge_notes([make_note(0, PEER_GONE, make_tracker(1))])
    assert state == BlameState(), "the rank may have been killed, and its engine with it"


def test_nobody_is_blamed_if_a_rank_ended_first_for_another_reason() -> None:
    notes = [make_note(0, PEER_GONE, make_tracker(1), turn=2), make_note(1, None, make_tracker(), turn=1)]
    assert judge_notes(notes) == BlameState(), (
        "its own signal, for example; its engine's end is what the others noticed"
    )


def test_rows_of_an_engine_that_did_not_die_are_not_blamed() -> None:
    own = EngineNote(1, 0, 0, 1, 2, None, make_tracker(1, 2).save())
    dead = EngineNote(1, 1, 1, 1, 1, EngineDeath.from_error(RAISED), make_tracker(3, 4).save())
    assert dict(judge_notes([own, dead]).deaths) == {3: 1, 4: 1}


def test_a_lone_row_is_not_held_for_the_death_of_an_engine_that_had_finished_nothing() -> None:
    tracker = BlameTracker()
    tracker.recall(BlameState(groups=[[5]]))
    tracker.add([Request(RequestId(5), [1])])
    tracker.take_batch()
    state = judge_notes([make_note(0, RAISED, tracker), make_note(1, PEER_GONE, make_tracker())])
    assert state.groups == [[5]] and state.held == []


@pytest.mark.parametrize("turns", [(1, 2), (2, 1)])
def test_a_lone_row_is_held_for_its_own_engines_death_though_the_other_one_was_noted_first(
    turns: tuple[int, int],
) -> None:
    tracker, other = BlameTracker(), make_tracker(1)
    tracker.recall(BlameState(groups=[[5]]))
    tracker.add([Request(RequestId(5), [1])])
    tracker.take_batch()
    other.finish(succeed(1))
    notes = [make_note(0, RAISED, tracker, turns[0]), make_note(1, PEER_GONE, other, turns[1])]
    assert judge_notes(notes).held == [(5, "the engine failed: RuntimeError: boom")]


def test_three_deaths_on_a_row_that_had_succeeded_forget_all_suspects(caplog: pytest.LogCaptureFixture) -> None:
    state, num_deaths = BlameState(held=[(5, "boom")]), 0
    while state.held:
        tracker = BlameTracker()
        tracker.recall(state)
        tracker.find_canary = lambda: Request(RequestId(0), [1])
        tracker.add([Request(RequestId(5), [1])])
        assert [request.row for request in tracker.take_batch()] == [0]
        state = judge_notes([make_note(0, RAISED, tracker), make_note(1, PEER_GONE, make_tracker())])
        num_deaths += 1
    assert num_deaths == 3 and state == BlameState()
    assert caplog.messages == ["the engine is sick: 3 deaths on a row that had succeeded before, so no row is blamed"]


def test_an_attempt_that_is_interrupted_goes_on_with_its_groups() -> None:
    tracker = BlameTracker()
    tracker.recall(BlameState(groups=[[1, 2], [3]], deaths=[(1, 2), (2, 2), (3, 2)]))
    tracker.add([Request(RequestId(1), [1]), Request(RequestId(2), [1])])
    tracker.take_batch()
    tracker.finish(succeed(2))
    state = judge_notes([make_note(0, None, tracker), make_note(1, None, make_tracker())])
    assert state.groups == [[1], [3]] and state.deaths == [(1, 2), (3, 2)]
