"""What is written whole or not at all: each system call failed in turn, and power lost around each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.journal_disk import Crash, FailingDisk

from dpgen.distributed.group import SingleRankGroup
from dpgen.errors import DpgenError
from dpgen.journal.files import atomic_write_text, publish_directory
from dpgen.journal.reader import index_journal
from dpgen.journal.segment import RowsLost
from dpgen.journal.writer import JournalWriter
from dpgen.output.gather import gather_segments
from dpgen.records import Completion, RowResult

HOWS = ["ENOSPC", "EIO", "EROFS", "before", "after"]


def each_call_failed(act: Callable[[FailingDisk], None], check: Callable[[bool], None]) -> None:
    """Does `act` once for every call that it makes and every way to fail it; `check(whether it claimed success)`."""
    calls = FailingDisk()
    act(calls)
    assert len(calls.calls) > 4
    for at in range(len(calls.calls)):
        for how in HOWS:
            disk = FailingDisk(at, how)
            try:
                act(disk)
            except (DpgenError, OSError, Crash):
                if disk.how in ("before", "after"):
                    disk.lose_power(kept=0.5)
                check(False)
            else:
                check(True)


def test_a_small_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    old, new = "old" * 100, "new" * 200

    def act(disk: FailingDisk) -> None:
        atomic_write_text(path, old)
        atomic_write_text(path, new, disk)

    def check(claimed: bool) -> None:
        assert path.read_text() in ([new] if claimed else [old, new])

    each_call_failed(act, check)


def test_a_short_write_of_a_small_file_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    disk = FailingDisk(1, "short")
    atomic_write_text(path, "0123456789", disk)
    assert path.read_text() == "0123456789" and disk.calls.count("write") == 2


def test_a_published_folder_is_whole_wherever_it_has_its_name(tmp_path: Path) -> None:
    final = tmp_path / "dataset"

    def act(disk: FailingDisk) -> None:
        temporary = tmp_path / ".dataset.tmp"
        for name in ("train-0", "train-1"):
            temporary.mkdir(exist_ok=True)
            (temporary / name).write_text("rows")
        publish_directory(temporary, final, disk)

    def check(claimed: bool) -> None:
        there = sorted(path.name for path in final.iterdir()) if final.exists() else []
        assert there in ([["train-0", "train-1"]] if claimed else [[], ["train-0", "train-1"]])

    each_call_failed(act, check)
    act(FailingDisk())
    check(True)


def journal_of(folder: Path, count: int) -> Path:
    folder.mkdir()
    journal = JournalWriter(folder, 1, 0)
    for row in range(count):
        journal.append(RowResult(row, 3, (Completion(f"text {row}", "stop", 2),)))
    journal.close()
    return journal.path


def test_a_damaged_segment_is_mended_where_it_lies_before_it_is_sent(tmp_path: Path) -> None:
    path = journal_of(tmp_path / "there", 100)
    home = tmp_path / "home"
    home.mkdir()
    data = bytearray(path.read_bytes())
    data[data.index(b"text 41")] ^= 1
    path.write_bytes(data)
    with pytest.raises(RowsLost, match=r"lost with that: 1 \(the first is row 41\).* run the same") as lost:
        gather_segments(SingleRankGroup(), home, [path], 1 << 20)
    assert lost.value.exit_status == 75
    assert 41 not in index_journal(path.parent).row, "this node generates it again"
    assert gather_segments(SingleRankGroup(), home, [path], 1 << 10) > 1
    assert len(index_journal(home)) == 99


def test_a_disk_that_is_full_where_rows_are_gathered_is_an_error(tmp_path: Path) -> None:
    path = journal_of(tmp_path / "there", 10)
    with pytest.raises(DpgenError, match=r"can't be written.*make room"):
        gather_segments(SingleRankGroup(), tmp_path / "no such folder", [path], 1 << 20)
