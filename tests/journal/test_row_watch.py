"""A row that holds its rank for good is published and noted, and the process ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
