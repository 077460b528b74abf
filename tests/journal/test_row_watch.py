"""A row that holds its rank for good is published and noted, and the process ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dpgen.journal import row_watch
from dpgen.journal.row_notes import RENDERING, RowDeath, decode_overdue, get_overdue_key, open_note, read_deaths
from dpgen.journal.row_watch import RowWatch


class WatchHarness:
    """Let a watch look at a note that a test changes, in place of its thread.

    Attributes:
        counters: of the store.
        reasons: why the process was to end.
    """

    def __init__(self, journal_dir: Path) -> None:
        self.note = open_note(journal_dir, 1, 0)
        self.counters: dict[str, int] = {}
        self.reasons: list[str] = []
        self.watch = RowWatch(self.note, overdue_s=5, stuck_s=10, add=self.add, end_process=self.reasons.append)

    def add(self, key: str, amount: int) -> int:
        self.counters[key] = self.counters.get(key, 0) + amount
        return self.counters[key]

    def hold(self, row: int, num_looks: int, check: Callable[[], None] = lambda: None) -> None:
        """Be in a row while the watch looks, and make a check before it is done."""

        def work(_: None) -> None:
            for _ in range(num_looks):
                self.watch.look()
            check()

        self.note.run(RENDERING, row, work, None)

    @property
    def published(self) -> int:
        return self.counters.get(get_overdue_key(self.note.name), 0)


def test_an_overdue_row_is_noted_and_published_for_other_nodes_while_it_lasts(tmp_path: Path) -> None:
    harness = WatchHarness(tmp_path)

    def check() -> None:
        assert read_deaths(tmp_path, [], lambda row: False) == [RowDeath(1, 0, 7, RENDERING, elapsed_s=5)]
        assert decode_overdue(harness.note.name, harness.published, 0.0) == RowDeath(1, 0, 7, RENDERING, elapsed_s=5)

    harness.hold(7, 6, check)
    harness.watch.look()
    assert harness.published == 0 and not harness.reasons
    assert decode_overdue(harness.note.name, 0, 0.0) is None


def test_rows_that_take_their_time_one_after_the_other_are_not_overdue(tmp_path: Path) -> None:
    harness = WatchHarness(tmp_path)
    for row in range(20):
        harness.hold(row, 5)
    assert not harness.counters and not harness.reasons
    assert read_deaths(tmp_path, [], lambda row: False) == []


def test_a_row_that_holds_the_rank_for_too_long_ends_the_process(tmp_path: Path) -> None:
    harness = WatchHarness(tmp_path)
    harness.hold(7, 10)
    assert not harness.reasons
    harness.hold(8, 11)
    [reason] = harness.reasons
    assert reason.startswith("rendering row 8 has taken 10 s and can't be interrupted.")


def test_a_rank_between_two_rows_is_not_overdue(tmp_path: Path) -> None:
    harness = WatchHarness(tmp_path)
    harness.hold(7, 1)
    for _ in range(20):
        harness.watch.look()
    assert not harness.counters and not harness.reasons
    harness.hold(7, 5)
    assert not harness.counters, "nor does that time count for the next row"


def test_a_limit_for_main_threads_does_not_shorten_that_of_rows(tmp_path: Path) -> None:
    harness = WatchHarness(tmp_path)
    harness.watch = RowWatch(harness.note, overdue_s=5, stuck_s=2, add=harness.add, end_process=harness.reasons.append)
    harness.hold(7, 5)
    assert not harness.reasons
    harness.hold(8, 6)
    assert len(harness.reasons) == 1 and len(harness.counters) == 1


def test_a_row_is_published_once_and_again_after_the_store_was_gone(tmp_path: Path) -> None:
    harness = WatchHarness(tmp_path)
    amounts: list[int] = []
    is_gone = True

    def add(key: str, amount: int) -> int:
        if is_gone:
            raise RuntimeError("the store is gone")
        amounts.append(amount)
        return amount

    harness.watch = RowWatch(harness.note, overdue_s=5, stuck_s=100, add=add, end_process=harness.reasons.append)

    def return_store() -> None:
        nonlocal is_gone
        is_gone = False
        harness.watch.look()
        harness.watch.look()

    harness.hold(7, 8, return_store)
    harness.watch.look()
    harness.watch.look()
    assert amounts == [7 * 4 + RENDERING, -(7 * 4 + RENDERING)]


def test_the_watch_looks_while_its_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_watch, "_INTERVAL_S", 0.001)
    has_ended = threading.Event()
    note, counters = open_note(tmp_path, 1, 0), dict[str, int]()
    watch = RowWatch(
        note, overdue_s=0.002, stuck_s=0.003, add=counters.setdefault, end_process=lambda _: has_ended.set()
    )
    with watch:
        [thread] = [thread for thread in threading.enumerate() if thread.name == "row watch"]
        assert note.run(RENDERING, 7, has_ended.wait, 30.0), "its thread looks"
        assert list(counters) == [get_overdue_key(note.name)]
    thread.join(30.0)
    assert not thread.is_alive(), "its thread ends with the block"
