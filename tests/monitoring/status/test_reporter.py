"""What one rank writes of itself, and that no disk and no file can stop it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from helpers.clock import FakeClock
from helpers.jobs import wait_for

from dpgen.engine.messages import EngineStats
from dpgen.errors import ConfigError, Interrupted, PeerFailed
from dpgen.monitoring.status.history import read_history
from dpgen.monitoring.status.record import RankRecord, read_process, read_records
from dpgen.monitoring.status.reporter import EngineView, RankReporter
from dpgen.records import Completion, RowError, RowResult
from dpgen.scheduling.progress.totals import Totals


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(100.0)


@pytest.fixture
def reporter(tmp_path: Path, clock: FakeClock) -> RankReporter:
    """Return the reporter of rank 3 of 8, without a thread."""
    reporter = RankReporter(clock, FakeClock(5000.0))
    reporter.start(tmp_path / "run", 3, 8, has_thread=False)
    return reporter


def begin_attempt(reporter: RankReporter, run_dir: Path, attempt: int = 1) -> None:
    """Begin an attempt as a run does, which has made its directory by then."""
    run_dir.mkdir(exist_ok=True)
    reporter.begin_attempt(attempt)


def read_one(run_dir: Path) -> RankRecord:
    [record] = read_records(run_dir / "status")
    return record


def test_a_record_holds_what_the_rank_does_and_who_it_is(
    reporter: RankReporter, clock: FakeClock, tmp_path: Path
) -> None:
    begin_attempt(reporter, tmp_path / "run", 2)
    reporter.count_rows(1000, 400)
    stats = EngineStats(500, 16, 32, num_preemptions=2, num_cached_tokens=30, kv_cache_usage=0.5)
    reporter.view = EngineView(lambda: stats, lambda: 1, lambda: 0.0)
    reporter.enter_phase("generating")
    reporter.write()
    clock.now_s += 10
    stats = EngineStats(1500, 16, 8, num_preemptions=2, num_cached_tokens=30, kv_cache_usage=0.75)
    reporter.tally.add_all([RowResult(7, 60, (Completion("text", "stop", 40),))])
    reporter.update(Totals(num_rows=20, num_generated_tokens=4000, num_unclaimed=5), 420)
    reporter.write()
    record = read_one(tmp_path / "run")
    assert (record.rank, record.num_ranks, record.attempt, record.state) == (3, 8, 2, "live")
    assert (record.phase, record.phase_s, record.time, record.sequence) == ("generating", 10.0, 5000.0, 2)
    assert record.process.pid == os.getpid() and record.process.host
    assert read_process(os.getpid()) is not None and record.process.process_start > 0
    counts = record.counts
    assert (counts.num_rows, counts.num_prompt_tokens, counts.num_generated_tokens) == (1, 60, 1500)
    assert (counts.num_running, counts.num_waiting, counts.kv_cache_usage, counts.tokens_per_s) == (16, 8, 0.75, 100)
    assert (counts.num_cached_tokens, counts.num_preemptions, counts.num_engine_restarts) == (30, 2, 1)
    assert record.run is not None and (record.run.num_rows, record.run.num_done) == (1000, 420)


def test_errors_are_counted_by_type_with_the_first_as_an_example(reporter: RankReporter, tmp_path: Path) -> None:
    begin_attempt(reporter, tmp_path / "run", 1)
    for row in range(200):
        reporter.tally.add_all([RowResult(row, error=RowError(f"type_{row % 2}", "long " * 1000))])
    for row in range(100):
        reporter.tally.add_all([RowResult(row, error=RowError(f"odd_{row}", "x"))])
    reporter.write()
    first, *others = read_one(tmp_path / "run").errors
    assert (first.type, first.num_rows, first.row, len(first.message)) == ("type_0", 100, 0, 300)
    assert len(others) == 50 and sum(kind.num_rows for kind in [first, *others]) == 300, "bounded, and none is lost"


def test_the_history_has_each_phase_and_step_with_its_time(
    reporter: RankReporter, clock: FakeClock, tmp_path: Path
) -> None:
    reporter.enter_phase("reading the input")
    clock.now_s += 3
    reporter.end_step("input")
    begin_attempt(reporter, tmp_path / "run", 1)
    clock.now_s += 1
    reporter.enter_phase("planning")
    reporter.write()
    reporter.finish()
    samples = read_history(tmp_path / "run" / "status" / "rank-3.history.jsonl")
    changes = [(s["elapsed_s"], s["phase"], s.get("step")) for s in samples if s.get("is_change")]
    assert changes == [
        (0.0, "starting", None),
        (0.0, "reading the input", None),
        (3.0, "reading the input", "input"),
        (4.0, "planning", None),
        (4.0, "finished", None),
    ]
    assert {s["attempt"] for s in samples} == {1} and samples[-1]["state"] == "finished"


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "finished", None),
        (Interrupted("interrupted by SIGTERM"), "stopped", "interrupted by SIGTERM"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (ConfigError("no room"), "failed", "no room"),
        (PeerFailed("rank 1 failed: no room"), "failed", None),
        (ZeroDivisionError("x"), "failed", "ZeroDivisionError: x"),
    ],
)
def test_the_last_record_says_how_the_rank_ended(
    error: BaseException | None, state: str, reason: str | None, reporter: RankReporter, tmp_path: Path
) -> None:
    begin_attempt(reporter, tmp_path / "run", 1)
    reporter.finish(error)
    reporter.finish(ConfigError("a second end"))
    record = read_one(tmp_path / "run")
    assert (record.state, record.reason) == (state, reason)


def test_a_start_that_begins_no_attempt_leaves_nothing_behind(reporter: RankReporter, tmp_path: Path) -> None:
    reporter.write()
    assert (tmp_path / "run" / "status" / "starting-rank-3.json").exists()
    reporter.finish(ConfigError("rejected"))
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_rejected_leaves_an_earlier_status_as_it_is(tmp_path: Path) -> None:
    for _ in range(2):
        reporter = RankReporter()
        reporter.start(tmp_path / "run", 0, 1, has_thread=False)
        if not (tmp_path / "run").exists():
            begin_attempt(reporter, tmp_path / "run")
            reporter.finish()
        reporter.write()
        reporter.finish(ConfigError("rejected"))
    assert read_one(tmp_path / "run").state == "finished"


def test_the_file_of_the_start_goes_when_the_attempt_begins(reporter: RankReporter, tmp_path: Path) -> None:
    reporter.write()
    begin_attempt(reporter, tmp_path / "run", 1)
    reporter.write()
    names = sorted(path.name for path in (tmp_path / "run" / "status").iterdir())
    assert names == ["rank-3.history.jsonl", "rank-3.json"]


def test_a_directory_that_can_not_be_written_is_reported_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status").write_text("a file where the directory should be")
    caplog.set_level(logging.INFO)
    for rank in (0, 1):
        reporter = RankReporter()
        reporter.start(tmp_path / "run", rank, 2, has_thread=False)
        reporter.begin_attempt(1)
        for _ in range(3):
            reporter.write()
        reporter.finish()
    assert len(caplog.messages) == 1 and "status can't be written: File exists" in caplog.messages[0], caplog.messages
    assert "the run continues" in caplog.messages[0]


def test_a_disk_that_hangs_does_not_hold_up_the_main_thread(tmp_path: Path) -> None:
    """A reporter's writes go to a FIFO that nobody reads, so they never return."""
    run_dir = tmp_path / "run"
    (run_dir / "status").mkdir(parents=True)
    os.mkfifo(run_dir / "status" / f".rank-0.json.{os.getpid()}.tmp")
    reporter = RankReporter()
    reporter.start(run_dir, 0, 1)
    reporter.begin_attempt(1)
    reporter.count_rows(10, 0)
    for row in range(1000):
        reporter.enter_phase(f"phase {row}")
        reporter.tally.add_all([RowResult(row, error=RowError("a", "b"))])
        reporter.update(Totals(num_rows=row), row)
    reporter.finish()  # waits for two seconds, and leaves the thread behind
    thread = reporter._thread
    assert thread is not None and thread.is_alive(), "the write still hangs"
    assert reporter.tally.counts.num_errors == 1000
    fd = os.open(run_dir / "status" / f".rank-0.json.{os.getpid()}.tmp", os.O_RDONLY | os.O_NONBLOCK)
    wait_for(lambda: not thread.is_alive())
    os.close(fd)


def test_the_thread_writes_by_itself(tmp_path: Path) -> None:
    reporter = RankReporter()
    reporter.interval_s = 0.01
    reporter.start(tmp_path / "run", 0, 1)
    begin_attempt(reporter, tmp_path / "run")
    wait_for(lambda: [record.sequence > 1 for record in read_records(tmp_path / "run" / "status")] == [True])
    reporter.finish()
    assert read_one(tmp_path / "run").state == "finished"


def test_many_ranks_write_less_often() -> None:
    reporter = RankReporter()
    reporter.start(Path("/nonexistent/run"), 0, 1000, has_thread=False)
    assert reporter.interval_s == 20.0
