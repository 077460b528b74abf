"""The generation loop, with fakes: reshards, lost ranks, failing rows, and results that the rank decodes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from dpgen.config.sections import WorkConfig
from dpgen.distributed.group import PeerLost, PendingReduce, SingleRankGroup
from dpgen.engine.checking.completion_checker import CheckedResult
from dpgen.engine.messages import EngineStats, Event, RowsFinished
from dpgen.errors import DpgenError, Interrupted, NoEngineLeft
from dpgen.journal.attempts import Rejection
from dpgen.journal.reader import index_journal
from dpgen.journal.row_notes import DECODING, RowNote, decode_word
from dpgen.journal.writer import JournalWriter
from dpgen.records import Completion, RankManifest, Request, RequestId, RowError, RowResult, UndecodedRow
from dpgen.scheduling import generation_loop
from dpgen.scheduling.claims import ShardClaimer
from dpgen.scheduling.generation_loop import GenerationLoop, LoopConfig
from dpgen.scheduling.groups.prompt_groups import RankState
from dpgen.scheduling.order import RowOrder
from dpgen.scheduling.request_builder import RequestBuilder
from dpgen.scheduling.request_source import RequestSource
from dpgen.scheduling.result_recorder import ResultRecorder
from dpgen.scheduling.retries.retry_tracker import RetryConfig, RetryTracker
from dpgen.scheduling.sources import SourceMaker

DEFAULTS = LoopConfig()


class FakeShard:
    """Rows with their own number as the only column."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def read_positions(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from ((row, {"row": row}) for row in self._rows[start:stop].tolist())


class FakePlanner:
    """Plan the rows that are neither finished nor running, for one rank."""

    def __init__(self, num_rows: int, group: SingleRankGroup) -> None:
        self._num_rows, self._group = num_rows, group
        self.states: list[RankState] = []
        self.order = RowOrder(np.zeros(0, dtype=np.int64))
        self.num_remaining_rows, self.num_inherited_rows, self.has_completions = 0, 0, False

    def plan(
        self, state: RankState | None = None, *, has_engine: bool = True, spread_first: bool = False
    ) -> RequestSource:
        state = state or RankState()
        self.states.append(state)
        rows = np.setdiff1d(np.arange(self._num_rows), np.concatenate([state.finished, state.running]))
        self.order, self.num_remaining_rows = RowOrder(rows), len(rows)
        if spread_first:
            self.order = self.order.spread_first()
        if len(rows) and not has_engine:
            raise NoEngineLeft("no rank has a working engine left")
        cursor = f"cursor/{len(self.states)}"
        self._group.store.add(cursor, 0)
        maker = SourceMaker(self.order, WorkConfig(), 1)
        claimer = maker.make_claimer(ShardClaimer, self._group.store, [cursor], 0)
        builder = RequestBuilder(lambda columns: ([columns["row"]], None), None, {})
        return maker.make_source(claimer, lambda shard: FakeShard(self.order.rows), builder)


class FakeEngine:
    """Finish every row at the poll after its submission; rows of `failing` as errors."""

    def __init__(self, max_num_seqs: int = 4, failing: Sequence[int] = ()) -> None:
        self.max_num_seqs, self.is_abandoned = max_num_seqs, False
        self._failing, self._requests = set(failing), list[Request]()

    def submit(self, requests: list[Request]) -> None:
        self._requests += requests

    def poll(self, timeout_s: float) -> list[Event]:
        ids, self._requests = [request.id for request in self._requests], []
        return [RowsFinished([self._finish(id.row).with_id(id) for id in ids])] if ids else []

    def _finish(self, row: int) -> RowResult:
        if row in self._failing:
            return RowResult(row, error=RowError("prompt_too_long", "600 tokens"))
        return RowResult(row, 1, (Completion("text", "stop", 3),))


class FakeJournal:
    """Keep results in a list."""

    def __init__(self) -> None:
        self.results: list[RowResult] = []

    def append(self, result: RowResult) -> None:
        self.results.append(result)

    def raise_if_failed(self) -> None:
        return


class FakeDetokenizer:
    """Make a text of every row."""

    def decode_row(self, undecoded: UndecodedRow) -> RowResult:
        [completion] = undecoded.result.completions
        decoded = Completion(f"decoded {undecoded.token_ids}", completion.finish_reason, completion.num_tokens)
        return RowResult(undecoded.result.row, undecoded.result.num_prompt_tokens, (decoded,))


class LossyGroup(SingleRankGroup):
    """Lose a peer at the first all-reduces, as often as `losses` say."""

    def __init__(self, losses: Sequence[str]) -> None:
        super().__init__()
        self._losses = list(losses)

    def all_reduce_async(self, values: Sequence[int], op: Literal["sum", "min"]) -> PendingReduce:
        if self._losses:
            raise PeerLost(self._losses.pop(0))
        return super().all_reduce_async(values, op)

    def lose(self, message: str) -> None:
        self._losses.append(message)


def make_loop(
    num_rows: int,
    engine: FakeEngine | None = None,
    group: SingleRankGroup | None = None,
    config: LoopConfig = DEFAULTS,
    stop_reason: str | None = None,
) -> tuple[GenerationLoop, FakePlanner, FakeJournal]:
    group = group or SingleRankGroup()
    planner, journal = FakePlanner(num_rows, group), FakeJournal()
    recorder = ResultRecorder(journal)  # type: ignore[arg-type]
    loop = GenerationLoop(planner, engine or FakeEngine(), recorder, group, config, lambda: stop_reason)
    return loop, planner, journal


def test_every_row_is_recorded_once_and_counted() -> None:
    loop, planner, journal = make_loop(50, FakeEngine(failing=[7]))
    progress: list[int] = []
    totals = loop.run(planner.plan(), lambda totals: progress.append(totals.num_rows))
    assert sorted(result.row for result in journal.results) == list(range(50))
    assert (totals.num_rows, totals.num_errors, totals.num_generated_tokens) == (50, 1, 3 * 49)
    assert progress[-1] == 50, "progress shows the end, too"
    manifest = loop.fill_manifest(RankManifest(0, "node"))
    assert (manifest.num_prompt_tokens, manifest.num_generated_tokens) == (49, 3 * 49)


class ShrinkingEngine(FakeEngine):
    """Lose half of the places with the last rows, as where one of two engines dies."""

    def poll(self, timeout_s: float) -> list[Event]:
        stats = EngineStats(num_running=self.max_num_seqs)
        finished = super().poll(timeout_s)
        if any(event.results[-1].row > 40 for event in finished if isinstance(event, RowsFinished)):
            self.max_num_seqs = 2
        return [*finished, stats]


def test_the_bound_is_that_of_the_engines_that_a_rank_had_and_not_of_those_at_its_end() -> None:
    engine = ShrinkingEngine(max_num_seqs=4)
    loop, planner, _ = make_loop(50, engine)
    loop.run(planner.plan())
    assert (engine.max_num_seqs, loop.measure_speed().max_num_seqs) == (2, 4)


def test_totals_tell_the_rows_in_the_engines_and_their_sequences() -> None:
    loop, planner, _ = make_loop(50, FakeEngine(max_num_seqs=8), config=LoopConfig(reserve_rows=0, num_samples=2))
    seen: list[tuple[int, int]] = []
    totals = loop.run(planner.plan(), lambda totals: seen.append((totals.num_running_rows, totals.num_running_seqs)))
    assert seen[0] == (4, 8) and seen[-1] == (0, 0)
    assert totals.num_ranks_without_engine == 0


def test_a_loop_that_lost_a_rank_continues_with_a_new_plan_for_the_rows_that_nobody_has_begun() -> None:
    group = LossyGroup(["lost rank 3 (no heartbeat for 60 s)"])
    loop, planner, journal = make_loop(50, group=group)
    with pytest.raises(PeerLost, match="lost rank 3"):
        loop.run(planner.plan())
    state = loop.get_state()
    begun = len(state.finished) + len(state.running)
    assert 0 < begun < 50, "the loss was to be noticed while the loop was at work"
    assert not set(state.finished) & set(state.running), "a row that is finished does not run any more"
    totals = loop.run(planner.plan(state))
    assert sorted(result.row for result in journal.results) == list(range(50)), "no row is lost or generated twice"
    assert totals.num_rows == 50, "rows from before the loss count"


def test_an_abandoned_engine_ends_the_loop_where_no_other_rank_has_one() -> None:
    engine = FakeEngine()
    loop, planner, _ = make_loop(20, engine)
    source = planner.plan()
    engine.is_abandoned, engine.max_num_seqs = True, 0
    with pytest.raises(NoEngineLeft, match="no rank has a working engine left"):
        loop.run(source)


def test_an_interrupted_loop_records_the_rows_that_the_engine_has_finished() -> None:
    loop, planner, journal = make_loop(20, stop_reason="interrupted by SIGTERM")
    with pytest.raises(Interrupted, match="interrupted by SIGTERM"):
        loop.run(planner.plan())
    assert journal.results


def test_rows_that_all_fail_abort_the_run_and_the_error_names_the_key_and_the_first_row() -> None:
    config = LoopConfig(max_leading_errors=10)
    loop, planner, _ = make_loop(20, FakeEngine(failing=range(20)), config=config)
    with pytest.raises(DpgenError) as caught:
        loop.run(planner.plan())
    assert str(caught.value) == (
        "the first 20 rows all failed (run.max_leading_errors=10), so the cause is probably in the configuration. "
        "Fix it and rerun with run.resume=force, or in another run.dir if the input changes, or set "
        "run.max_leading_errors=0 to continue regardless. "
        "Row 0 failed with prompt_too_long: 600 tokens"
    )


def test_one_good_row_keeps_a_run_of_failing_rows_going() -> None:
    config = LoopConfig(max_leading_errors=10)
    loop, planner, _ = make_loop(20, FakeEngine(failing=range(19)), config=config)
    assert loop.run(planner.plan()).num_errors == 19


@pytest.fixture
def sync_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpgen.scheduling.generation_loop._SYNC_INTERVAL_S", 0.0)


@pytest.mark.usefixtures("sync_in_every_round")
@pytest.mark.parametrize("good_rows", [range(990, 1000), range(700, 800)], ids=["at the end", "before other bad rows"])
def test_rows_that_fail_first_do_not_stop_a_run_whose_good_rows_come_later(
    good_rows: range, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    failing = sorted(set(range(1000)) - set(good_rows))
    loop, planner, journal = make_loop(1000, FakeEngine(failing=failing), config=LoopConfig(max_leading_errors=10))
    assert loop.run(planner.plan()).num_errors == len(failing)
    assert sorted(result.row for result in journal.results) == list(range(1000))
    assert "no row has succeeded yet, trying 10 rows from the rest of the order before stopping" in caplog.messages


@pytest.mark.usefixtures("sync_in_every_round")
def test_a_run_stops_early_once_rows_from_the_whole_order_have_failed() -> None:
    config = LoopConfig(max_leading_errors=10)
    loop, planner, journal = make_loop(2000, FakeEngine(failing=range(2000)), config=config)
    with pytest.raises(DpgenError, match=r"all failed, 11 rows from the rest of the order among them \(run\.max_lead"):
        loop.run(planner.plan())
    assert len(journal.results) < 1000
    assert {1999, 1998, 1996, 1992} <= {result.row for result in journal.results}


@pytest.mark.usefixtures("sync_in_every_round")
def test_rows_that_all_fail_do_not_stop_a_run_that_has_had_success_before() -> None:
    loop, planner, _ = make_loop(200, FakeEngine(failing=range(200)), config=LoopConfig(max_leading_errors=10))
    source = planner.plan()
    planner.has_completions = True
    assert loop.run(source).num_errors == 200


@pytest.mark.usefixtures("sync_in_every_round")
def test_rows_are_tried_again_after_a_rank_was_lost_with_some_of_them() -> None:
    config, group = LoopConfig(max_leading_errors=10), LossyGroup([])
    loop, planner, _ = make_loop(2000, FakeEngine(failing=range(2000)), group, config)
    plan, num_trials = planner.plan, 0

    def plan_and_lose_a_rank(*args: Any, **kwargs: Any) -> RequestSource:
        nonlocal num_trials
        if kwargs.get("spread_first"):
            num_trials += 1
            if num_trials == 1:
                group.lose("lost rank 3")
        return plan(*args, **kwargs)

    planner.plan = plan_and_lose_a_rank  # type: ignore[method-assign]
    with pytest.raises(PeerLost):
        loop.run(planner.plan())
    with pytest.raises(DpgenError, match="all failed"):
        loop.run(planner.plan(loop.get_state()))
    assert num_trials == 2, "the lost rank may have had rows of the first trial"


def test_a_recorder_decodes_only_the_rows_that_the_engine_did_not() -> None:
    journal = FakeJournal()
    recorder = ResultRecorder(journal, FakeDetokenizer())  # type: ignore[arg-type]
    decoded = RowResult(0, 1, (Completion("text", "stop", 2),))
    recorder.add(decoded)
    undecoded = UndecodedRow(RowResult(1, 1, (Completion("", "stop", 2),)), ([5, 6],), skip_special_tokens=True)
    recorder.add(undecoded)
    assert [result.completions[0].text for result in recorder.take_recorded()] == ["text", "decoded ([5, 6],)"]
    assert recorder.take_recorded() == [] and [result.row for result in journal.results] == [0, 1]


class BrokenDetokenizer(FakeDetokenizer):
    """Fail at token 7."""

    def decode_row(self, undecoded: UndecodedRow) -> RowResult:
        if 7 in undecoded.token_ids[0]:
            raise OverflowError("out of range integral type\nconversion attempted")
        return super().decode_row(undecoded)


def test_a_row_that_cannot_be_decoded_becomes_an_error_of_its_own() -> None:
    journal = FakeJournal()
    recorder = ResultRecorder(journal, BrokenDetokenizer())  # type: ignore[arg-type]
    for row, token_id in enumerate([5, 7, 6]):
        recorder.add(UndecodedRow(RowResult(row, 4, (Completion("", "stop", 1),)), ([token_id],), True))
    assert [result.row for result in journal.results] == [0, 1, 2], "the other rows of the message are kept"
    error = RowError(
        "decode_failed", "decoding the generated tokens failed: out of range integral type conversion attempted"
    )
    assert journal.results[1] == RowResult(1, 4, error=error)
    assert journal.results[2].completions[0].text == "decoded ([6],)"


def test_the_note_names_the_row_that_is_decoded() -> None:
    note, noted = RowNote(), []

    class LookingDetokenizer(FakeDetokenizer):
        def decode_row(self, undecoded: UndecodedRow) -> RowResult:
            noted.append(decode_word(note.read()))
            return super().decode_row(undecoded)

    recorder = ResultRecorder(FakeJournal(), LookingDetokenizer(), note)  # type: ignore[arg-type]
    recorder.add(UndecodedRow(RowResult(7, 4, (Completion("", "stop", 1),)), ([5],), True))
    assert noted == [(7, DECODING)] and note.read() == 0


def test_a_row_that_cannot_be_encoded_becomes_an_error_of_its_own(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path, 1, 0)
    recorder = ResultRecorder(journal)
    recorder.add(RowResult(0, 4, (Completion("text", "stop", 1),)))
    recorder.add(RowResult(1, 4, (Completion(b"bytes", "stop", 1),)))  # type: ignore[arg-type]
    recorder.add(RowResult(2, 4, (Completion("text", "stop", 1),)))
    [_, broken, _] = recorder.take_recorded()
    journal.close()
    assert broken.error is not None and broken.error.type == "decode_failed"
    assert broken.error.message.startswith("encoding the result for the journal failed: Object of type bytes is not")
    index = index_journal(tmp_path)
    assert (index.row.tolist(), index.error.tolist()) == ([0, 1, 2], [False, True, False])


def test_a_journal_that_cannot_be_written_is_no_error_of_the_row() -> None:
    class FullJournal(FakeJournal):
        def append(self, result: RowResult) -> None:
            raise DpgenError("No space left on device")

    with pytest.raises(DpgenError, match="No space left on device"):
        ResultRecorder(FullJournal()).add(RowResult(0, 4))  # type: ignore[arg-type]


class RejectingChecker:
    """Reject every completion at the next poll."""

    def __init__(self) -> None:
        self._results: list[RowResult] = []

    def __len__(self) -> int:
        return len(self._results)

    @property
    def pending_ids(self) -> list[RequestId]:
        return [result.id for result in self._results]

    def expect(self, row: int) -> None:
        pass

    def submit(self, result: RowResult, first_attempt: int) -> None:
        self._results.append(result)

    def poll(self) -> list[CheckedResult]:
        results, self._results = self._results, []
        return [CheckedResult(result, (Rejection("regex", "it is found nowhere"),)) for result in results]


def make_checked_loop(
    engine: FakeEngine, num_rows: int
) -> tuple[GenerationLoop, FakePlanner, FakeJournal, list[bytes]]:
    """Return a loop whose completions are all rejected, twice at most, and the records of the attempts."""
    group, journal, records = SingleRankGroup(), FakeJournal(), list[bytes]()
    planner = FakePlanner(num_rows, group)
    tracker = RetryTracker(
        RetryConfig(max_attempts=2),
        RejectingChecker(),  # type: ignore[arg-type]
        lambda row, record: records.append(record),
        lambda row: None,
        lambda: 100,
    )
    recorder = ResultRecorder(journal, retries=tracker)  # type: ignore[arg-type]
    return GenerationLoop(planner, engine, recorder, group, DEFAULTS, lambda: None), planner, journal, records


def test_rejected_rows_go_to_the_engine_again_until_they_have_no_attempt_left() -> None:
    loop, planner, journal, records = make_checked_loop(FakeEngine(), 10)
    totals = loop.run(planner.plan())
    assert sorted(result.row for result in journal.results) == list(range(10)) and len(records) == 20
    assert all(result.error is not None and result.error.type == "check_failed" for result in journal.results)
    assert (totals.num_rows, totals.num_errors, totals.num_rejected_tokens) == (10, 10, 60)
    assert sum(totals.num_retries) == 10
    manifest = loop.fill_manifest(RankManifest(0, "node"))
    assert (manifest.num_retries, manifest.num_rejected_tokens) == ({"regex": 10}, 60)


def test_workers_are_asked_for_the_results_of_several_steps_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    class SteppingEngine(FakeEngine):
        """Finish one row in each step of 10 ms."""

        def poll(self, timeout_s: float) -> list[Event]:
            nonlocal now_s
            now_s += 0.01 if timeout_s else 0
            requests, self._requests = self._requests[timeout_s > 0 :], self._requests[: timeout_s > 0]
            events = super().poll(timeout_s)
            self._requests = requests
            return events

    num_polls, poll = 0, RejectingChecker.poll

    def count_polls(checker: RejectingChecker) -> list[CheckedResult]:
        nonlocal num_polls
        num_polls += 1
        return poll(checker)

    monkeypatch.setattr(RejectingChecker, "poll", count_polls)
    monkeypatch.setattr(generation_loop, "time", SimpleNamespace(monotonic=lambda: now_s, sleep=lambda _: None))
    loop, planner, _, records = make_checked_loop(SteppingEngine(max_num_seqs=16), 40)
    assert loop.run(planner.plan()).num_rows == 40
    assert len(records) == 80, "every attempt is checked"
    assert 80 / 5 <= num_polls <= 80 / 2, "40 ms are four steps; the last rows are not waited for"


def test_an_idle_engine_gets_a_program_s_call_as_soon_as_its_image_is_prepared() -> None:
    waits: list[float] = []

    class IdleEngine(FakeEngine):
        def poll(self, timeout_s: float) -> list[Event]:
            if timeout_s:
                waits.append(timeout_s)
            return super().poll(timeout_s)

    class PreparingRecorder(ResultRecorder):
        """Begin no row while a call is being prepared, as with program.max_running=1."""

        @property
        def num_preparing(self) -> int:
            return int(len(waits) < 3)

        @property
        def can_begin(self) -> bool:
            return not self.num_preparing

    group = SingleRankGroup()
    planner = FakePlanner(4, group)
    recorder = PreparingRecorder(FakeJournal())  # type: ignore[arg-type]
    loop = GenerationLoop(planner, IdleEngine(), recorder, group, DEFAULTS, lambda: None)
    assert loop.run(planner.plan()).num_rows == 4
    assert max(waits[:3]) <= 0.01, "a call is looked for as often as a row would be"


def test_an_abandoned_engines_rejected_rows_are_planned_again_with_their_attempts() -> None:
    class DyingEngine(FakeEngine):
        def poll(self, timeout_s: float) -> list[Event]:
            events = super().poll(timeout_s)
            if events:
                self.is_abandoned, self.max_num_seqs = True, 0
            return events

    loop, planner, journal, records = make_checked_loop(DyingEngine(), 2)
    with pytest.raises(NoEngineLeft):
        loop.run(planner.plan())
    state = planner.states[-1]
    assert not journal.results and len(state.running) == 0
    assert list(state.attempts) == records and records, "whoever gets the rows repeats no attempt"
