"""Test that files are written in full or not at all, whichever system call fails or loses power."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

FAILURES = ["ENOSPC", "EIO", "EROFS", "before", "after"]


def fail_each_call(act: Callable[[FailingDisk], None], check: Callable[[bool], None]) -> None:
    """Run `act` for every call that it makes and every way to fail the call, then `check(has_succeeded)`."""
    calls = FailingDisk()
    act(calls)
    assert len(calls.calls) > 4
    for at in range(len(calls.calls)):
        for how in FAILURES:
            disk = FailingDisk(at, how)
            try:
                act(disk)
            except (DpgenError, OSError, Crash):
                if disk.how in ("before", "after"):
                    disk.lose_power(kept=0.5)
                check(False)
            else:
                check(True)


def test_a_small_file_has_its_old_or_its_new_content(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    old, new = "old" * 100, "new" * 200

    def act(disk: FailingDisk) -> None:
        atomic_write_text(path, old)
        atomic_write_text(path, new, disk)

    def check(has_succeeded: bool) -> None:
        assert path.read_text() in ([new] if has_succeeded else [old, new])

    fail_each_call(act, check)


def test_writers_with_one_process_id_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "run.json"  # in containers, ranks of all nodes have the same process ids
    contents = [letter * 1000 for letter in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: atomic_write_text(path, contents[number % 4]), range(200)))
    assert path.read_text() in contents
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_a_file_that_cannot_be_written_leaves_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(DpgenError, match="can't be written"):
        atomic_write_text(tmp_path / "run.json", "text", FailingDisk(1, "ENOSPC"))
    assert not list(tmp_path.iterdir())


def test_a_short_write_of_a_small_file_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    disk = FailingDisk(1, "short")
    atomic_write_text(path, "0123456789", disk)
    assert path.read_text() == "0123456789" and disk.calls.count("write") == 2


def test_a_published_directory_is_complete_under_its_name(tmp_path: Path) -> None:
    final = tmp_path / "dataset"

    def act(disk: FailingDisk) -> None:
        temporary = tmp_path / ".dataset.tmp"
        for name in ("train-0", "train-1"):
            temporary.mkdir(exist_ok=True)
            (temporary / name).write_text("rows")
        publish_directory(temporary, final, disk)

    def check(has_succeeded: bool) -> None:
        names = sorted(path.name for path in final.iterdir()) if final.exists() else []
        assert names in ([["train-0", "train-1"]] if has_succeeded else [[], ["train-0", "train-1"]])

    fail_each_call(act, check)
    act(FailingDisk())
    check(True)


def write_journal(journal_dir: Path, count: int) -> Path:
    journal_dir.mkdir()
    journal = JournalWriter(journal_dir, 1, 0)
    for row in range(count):
        journal.append(RowResult(row, 3, (Completion(f"text {row}", "stop", 2),)))
    journal.close()
    return journal.path


def test_a_damaged_segment_is_repaired_on_its_own_node_before_it_is_sent(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "node 1", 100)
    rank_0_dir = tmp_path / "rank 0"
    rank_0_dir.mkdir()
    data = bytearray(path.read_bytes())
    data[data.index(b"text 41")] ^= 1
    path.write_bytes(data)
    with pytest.raises(RowsLost, match=r"Rows lost: 1 \(first: row 41\).* rerun the same command") as lost:
        gather_segments(SingleRankGroup(), rank_0_dir, [path], 1 << 20)
    assert lost.value.exit_status == 75
    assert 41 not in index_journal(path.parent).row, "this node generates it again"
    assert gather_segments(SingleRankGroup(), rank_0_dir, [path], 1 << 10) > 1
    assert len(index_journal(rank_0_dir)) == 99


def test_a_disk_that_is_full_while_rows_are_gathered_is_an_error(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "node 1", 10)
    with pytest.raises(DpgenError, match=r"can't be written.*free space"):
        gather_segments(SingleRankGroup(), tmp_path / "no such directory", [path], 1 << 20)
