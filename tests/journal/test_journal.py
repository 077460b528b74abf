"""Test that the journal returns every synced row, returns no torn or damaged row, and counts each row once."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.clock import FakeClock
from helpers.jobs import Launcher, load_result, make_numbered_rows, wait_for
from helpers.journal_disk import Crash, FailingDisk
from hypothesis import given, settings
from hypothesis import strategies as st

from dpgen.errors import DpgenError, RowRefused
from dpgen.journal import reader as reader_module
from dpgen.journal import writer
from dpgen.journal.files import FileSystem
from dpgen.journal.reader import (
    BATCH_ROWS,
    DamagedRecord,
    JournalReader,
    index_journal,
    last_attempt,
    list_segments,
    merge_segments,
    read_segment,
)
from dpgen.journal.segment import SegmentWriter, WriteBatch, repair_segment
from dpgen.journal.writer import JournalWriter
from dpgen.records import Completion, RequestId, RowResult, make_rejected_result
from dpgen.result_codec import decode_result, encode_result

NEVER_S = 1e6


def result(row: int, text: str = "hello") -> RowResult:
    return RowResult(row, 3, (Completion(text, "stop", 2),))


def write_sealed(
    directory: Path, results: Sequence[RowResult], attempt: int = 1, rank: int = 0, **options: Any
) -> Path:
    journal = JournalWriter(directory, attempt, rank, **options)
    for row_result in results:
        journal.append(row_result)
    journal.close()
    return journal.path


def write_unsealed(directory: Path, results: Sequence[RowResult], attempt: int = 1, rank: int = 0) -> Path:
    """Write a segment as a killed writer leaves it."""
    path = write_sealed(directory, results, attempt, rank)
    frames = read_segment(path).frames
    os.truncate(path, int(frames.offset[-1] + frames.length[-1]))
    return path


def read(directory: Path) -> dict[int, RowResult]:
    """Return the results of a journal by row, without damaged records."""
    results, index = {}, index_journal(directory)
    with JournalReader(index) as reader:
        for position in range(len(index)):
            with contextlib.suppress(DamagedRecord):
                results[int(index.row[position])] = reader.result(position)
    return results


@contextmanager
def make_temporary_directory() -> Iterator[Path]:
    """Yield a directory for one example of a property test."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


TEXTS = ["", "plain", "ünïcode 漢字 🎉", "null \0 byte", "lone \ud800 surrogate", "line\nbreak", "x" * 100_000]
results_of_any_kind = st.lists(
    st.one_of(
        st.builds(result, st.integers(0, 20), st.text(max_size=30)),
        st.builds(
            lambda row: make_rejected_result(RequestId(row), RowRefused("bad", "it was bad")), st.integers(0, 20)
        ),
    ),
    min_size=1,
    max_size=12,
)


# ---- written rows are read


def test_every_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    results = [result(row, text) for row, text in enumerate(TEXTS)]
    results.append(make_rejected_result(RequestId(50), RowRefused("empty_prompt", "nothing")))
    results.append(RowResult(51, 1, (Completion("a", "stop", 1, [5]), Completion("b", None, 2, [6, 7]))))
    write_sealed(tmp_path, results)
    assert read(tmp_path) == {expected.row: expected for expected in results}
    assert all(decode_result(encode_result(expected)) == expected for expected in results)


def test_a_large_journal_is_split_into_several_sealed_segments(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path, 1, 0, segment_bytes=1000)
    for row in range(100):
        journal.append(result(row))
        if row % 5 == 4:
            journal.sync()
    journal.close()
    assert journal.paths == list_segments(tmp_path) and len(journal.paths) > 5
    assert journal.num_rows == journal.num_synced_rows == 100
    assert journal.num_bytes == sum(path.stat().st_size for path in journal.paths)
    assert all(read_segment(path).is_sealed for path in journal.paths)
    assert read(tmp_path) == {row: result(row) for row in range(100)}


def test_a_sealed_segment_is_indexed_without_reading_its_payloads(tmp_path: Path) -> None:
    path = write_sealed(tmp_path, [result(row, "x" * 100_000) for row in range(20)])
    content = bytearray(path.read_bytes())
    content[1000:1_900_000] = bytes(1_899_000)
    path.write_bytes(content)
    assert list(index_journal(tmp_path).row) == list(range(20)), "the index of the segment lists its rows"
    assert sorted(read(tmp_path)) == [19], "but no unsound record is returned"
    segment = read_segment(path, check=True)
    assert segment.damage is not None and "19 damaged records, the first at byte 24 (row 0)" in segment.damage


def test_an_index_keeps_25_bytes_per_row(tmp_path: Path) -> None:
    write_sealed(tmp_path, [result(row) for row in range(1000)])
    index = index_journal(tmp_path)
    arrays = (index.row, index.file, index.offset, index.length, index.error)
    assert sum(values.nbytes for values in arrays) == 25 * 1000


@pytest.mark.parametrize(("limit", "num_open_files"), [(10, 64), (128, 64), (240, 120), (1024, 150), (-1, 150)])
def test_at_most_half_of_the_files_that_may_be_open_are_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, num_open_files: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    for rank in range(150):
        write_sealed(tmp_path, [result(rank)], rank=rank)
    index = index_journal(tmp_path)
    with JournalReader(index) as reader:
        num_open = len(os.listdir("/proc/self/fd"))
        assert [reader.result(position).row for position in range(150)] == list(range(150))
        assert len(os.listdir("/proc/self/fd")) - num_open == num_open_files
        assert reader.result(0).row == 0


@pytest.mark.parametrize(("limit", "opens_per_file"), [(128, 4), (1024, 1)], ids=["few files", "enough files"])
def test_results_of_many_files_are_read_in_order_with_one_open_for_each_file_and_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, opens_per_file: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    num_files, rows = 200, 3 * BATCH_ROWS
    for rank in range(num_files):  # rows come round-robin over the ranks, as they do in a run
        write_sealed(tmp_path, [result(row) for row in range(rank, rows, num_files)], rank=rank)
    index = index_journal(tmp_path)
    num_opens = 0
    open_file = os.open

    def count(*arguments: Any, **options: Any) -> int:
        nonlocal num_opens
        num_opens += 1
        return open_file(*arguments, **options)

    monkeypatch.setattr(os, "open", count)
    with JournalReader(index) as reader:
        batches = list(reader.iter_batches(np.arange(rows)))
        backwards = [item.row for batch in reader.iter_batches(np.arange(50)[::-1]) for item in batch]
    assert [item.row for batch in batches for item in batch] == list(range(rows))
    assert backwards == list(range(50))[::-1], "in the order of the positions"
    assert num_opens <= opens_per_file * num_files, f"{num_opens} opens for {len(batches)} batches"


def test_a_batch_is_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sealed(tmp_path, [result(row) for row in range(100)])
    index = index_journal(tmp_path)
    max_bytes = 5 * int(index.length.max())
    monkeypatch.setattr(reader_module, "BATCH_BYTES", max_bytes)
    with JournalReader(index) as reader:
        batches = list(reader.iter_batches(np.arange(100)))
        assert [item.row for batch in batches for item in batch] == list(range(100))
        assert all(sum(index.length[item.row] for item in batch) <= max_bytes for batch in batches)
        monkeypatch.setattr(reader_module, "BATCH_BYTES", 1)
        assert [len(batch) for batch in reader.iter_batches(np.arange(3))] == [1, 1, 1], "one row is a batch at least"


# ---- torn and damaged records


@settings(deadline=None, max_examples=60)
@given(results=results_of_any_kind, fraction=st.floats(0, 1))
def test_any_truncation_keeps_the_rows_before_it(results: list[RowResult], fraction: float) -> None:
    results = [RowResult(row, drawn.num_prompt_tokens, drawn.completions) for row, drawn in enumerate(results)]
    with make_temporary_directory() as path:
        segment = write_sealed(path, results)
        size = int(segment.stat().st_size * fraction)
        os.truncate(segment, size)
        contents = read_segment(segment, check=True)
        assert contents.damage is None, "a crash can leave this, and it is harmless"
        kept = read(path)
        assert kept == {expected.row: expected for expected in results[: len(kept)]}
        ends = contents.frames.offset + contents.frames.length
        assert (ends <= size).all()


def test_every_truncation_of_a_journal_keeps_the_rows_before_it(tmp_path: Path) -> None:
    path = write_sealed(tmp_path, [result(row) for row in range(4)])
    ends = read_segment(path).frames.offset + read_segment(path).frames.length
    content = path.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        assert list(index_journal(tmp_path).row) == list(range(int((ends <= size).sum())))


@pytest.mark.parametrize("write", [write_sealed, write_unsealed])
def test_any_damaged_byte_loses_at_most_its_row_and_is_reported(
    tmp_path: Path, write: Callable[[Path, list[RowResult]], Path]
) -> None:
    """No wrong row is returned; a sealed segment loses at most the damaged row, and reports the damage."""
    results = {row: result(row, f"text {row}") for row in range(4)}
    path = write(tmp_path, list(results.values()))
    frames = read_segment(path).frames
    end_of_rows = int(frames.offset[-1] + frames.length[-1])
    content = path.read_bytes()
    for offset in range(len(content)):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 0x41]) + content[offset + 1 :])
        kept = read(tmp_path)
        assert kept.items() <= results.items()
        segment = read_segment(path, check=True)
        assert set(segment.frames.row) == set(kept), "both ways of reading return the same rows"
        if write is write_sealed:
            assert len(kept) == 4 if offset >= end_of_rows or offset < 24 else len(kept) == 3 or not segment.is_sealed
            assert segment.damage is not None or segment.torn_bytes or 0 <= offset < 24
        elif 24 <= offset < frames.offset[3] - 17:
            assert segment.damage is not None, "sound frames follow the damaged one, which no crash causes"


@settings(deadline=None, max_examples=100)
@given(
    results=results_of_any_kind,
    is_sealed=st.booleans(),
    fraction=st.floats(0, 1, exclude_max=True),
    change=st.integers(1, 255),
)
def test_no_damaged_byte_gives_a_wrong_row(
    results: list[RowResult], is_sealed: bool, fraction: float, change: int
) -> None:
    with make_temporary_directory() as path:
        segment = (write_sealed if is_sealed else write_unsealed)(path, results)
        content = bytearray(segment.read_bytes())
        content[int(len(content) * fraction)] ^= change
        segment.write_bytes(content)
        assert all(kept in results for kept in read(path).values())
        repair_segment(segment)
        index = index_journal(path)
        with JournalReader(index) as reader:
            kept = [reader.result(position) for position in range(len(index))]
        assert all(row_result in results for row_result in kept), "after a repair every record can be read"


def test_a_tail_that_a_crash_leaves_is_no_damage(tmp_path: Path) -> None:
    path = write_unsealed(tmp_path, [result(row) for row in range(4)])
    content = path.read_bytes()
    for tail in (b"\0" * 5000, b"\xff" * 5000, b"abc", content[24:60]):
        path.write_bytes(content + tail)
        segment = read_segment(path, check=True)
        assert segment.damage is None and segment.torn_bytes == len(tail) and len(segment.frames) == 4
    for beginning in (b"", b"\0" * 100, content[:10], content[:20]):
        path.write_bytes(beginning)
        assert read_segment(path, check=True).damage is None and not read(tmp_path)


def test_an_index_of_another_segment_is_not_trusted(tmp_path: Path) -> None:
    path = write_sealed(tmp_path, [result(row) for row in range(3)])
    other = write_sealed(tmp_path / "..", [result(row) for row in (7, 8, 9)], attempt=77)
    end = int(read_segment(path).frames.offset[-1] + read_segment(path).frames.length[-1])
    path.write_bytes(path.read_bytes()[:end] + other.read_bytes()[end:])
    assert sorted(read(tmp_path)) == [0, 1, 2]
    assert read_segment(path, check=True).damage is not None


def test_an_index_is_not_trusted_after_bytes_before_it_were_removed(tmp_path: Path) -> None:
    path = write_sealed(tmp_path, [result(row) for row in range(3)])
    frames = read_segment(path).frames
    content = path.read_bytes()
    path.write_bytes(content[: int(frames.offset[0]) - 17] + content[int(frames.offset[1]) - 17 :])
    assert sorted(read(tmp_path)) == [1, 2]


def test_a_damaged_segment_is_repaired_and_the_damaged_file_is_kept(tmp_path: Path) -> None:
    path = write_sealed(tmp_path, [result(row) for row in range(5)])
    assert read_segment(path, check=True).is_sealed
    assert repair_segment(path) == []
    content = bytearray(path.read_bytes())
    content[int(read_segment(path).frames.offset[2]) + 3] ^= 1
    path.write_bytes(content)
    assert repair_segment(path) == [2]
    assert read(tmp_path) == {row: result(row) for row in (0, 1, 3, 4)}
    assert len(index_journal(tmp_path)) == 4, "row 2 counts as missing, so that it is generated again"
    assert read_segment(path, check=True).damage is None
    assert (tmp_path / f"{path.name}.damaged").read_bytes() == content
    assert repair_segment(path) == []


def test_a_damaged_segment_that_was_never_sealed_stays_as_it_is(tmp_path: Path) -> None:
    path = write_unsealed(tmp_path, [result(row) for row in range(5)])
    content = bytearray(path.read_bytes())
    content[int(read_segment(path).frames.offset[2]) + 3] ^= 1
    path.write_bytes(content)
    segment = read_segment(path, check=True)
    assert segment.damage is not None and not segment.is_sealed
    assert repair_segment(path) == []
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    assert read(tmp_path) == {0: result(0), 1: result(1)}


def test_a_segment_that_cant_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "attempt-0001-rank-00000-part-0000.journal").mkdir()
    with pytest.raises(DpgenError, match=r"part-0000.journal can't be read: .*fix the disk"):
        index_journal(tmp_path)


# ---- a row counts once


def test_a_row_counts_once_a_completion_before_an_error_then_the_earlier_result(tmp_path: Path) -> None:
    write_sealed(
        tmp_path,
        [make_rejected_result(RequestId(0), RowRefused("x", "y")), result(1, "early"), result(2, "rank 0")],
        attempt=1,
    )
    write_sealed(tmp_path, [result(2, "rank 1")], attempt=1, rank=1)
    write_sealed(tmp_path, [result(0, "late"), result(1, "late")], attempt=2)
    texts = {row: kept.completions[0].text for row, kept in read(tmp_path).items()}
    assert texts == {0: "late", 1: "early", 2: "rank 0"}
    assert last_attempt(tmp_path) == 2


@settings(deadline=None, max_examples=40)
@given(
    writers=st.dictionaries(
        st.tuples(st.sampled_from([1, 2, 10_001]), st.sampled_from([0, 1, 100_000])),
        results_of_any_kind,
        min_size=1,
        max_size=5,
    ),
    data=st.data(),
)
def test_which_result_counts_does_not_depend_on_the_order_of_writing(
    writers: dict[tuple[int, int], list[RowResult]], data: st.DataObject
) -> None:
    """Completion, attempt, rank and position decide, in whatever order attempts and ranks write."""
    turns = data.draw(st.permutations([key for key, results in writers.items() for _ in results]))
    with make_temporary_directory() as path:
        journals = {
            key: JournalWriter(path, *key, segment_bytes=150, sync_interval_s=NEVER_S)
            for key in data.draw(st.permutations(list(writers)))
        }
        unwritten = {key: list(results) for key, results in writers.items()}
        for key in turns:
            journals[key].append(unwritten[key].pop(0))
            if data.draw(st.booleans()):
                journals[key].sync()
        for journal in journals.values():
            journal.close()
        expected: dict[int, RowResult] = {}
        in_order = [row_result for key in sorted(writers) for row_result in writers[key]]
        for row_result in sorted(in_order, key=lambda row_result: row_result.error is not None):
            expected.setdefault(row_result.row, row_result)
        assert read(path) == expected
        segments = [read_segment(segment, check=True) for segment in list_segments(path)]
        shuffled, index = merge_segments(data.draw(st.permutations(segments))), index_journal(path)
        for name in ("row", "file", "offset", "length", "error"):
            np.testing.assert_array_equal(getattr(shuffled, name), getattr(index, name))


def test_no_attempt_appends_to_another_attempts_segment(tmp_path: Path) -> None:
    write_sealed(tmp_path, [result(0)])
    with pytest.raises(DpgenError, match="can't be written: File exists"):
        JournalWriter(tmp_path, 1, 0)


# ---- within a second


class SlowDisk(FileSystem):
    def sync(self, fd: int) -> None:
        time.sleep(0.2)
        super().sync(fd)


def test_a_row_is_on_disk_within_a_second_although_syncs_are_slow(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path, 1, 0, files=SlowDisk())
    appended_s: list[float] = []
    synced_s: list[float] = []
    stalls_s: list[float] = []

    def watch() -> None:
        while len(synced_s) < 300:
            synced_s.extend([time.monotonic()] * (journal.num_synced_rows - len(synced_s)))
            looked_s = time.monotonic()
            time.sleep(0.01)
            stalls_s.append(time.monotonic() - looked_s - 0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for row in range(300):
        appended_s.append(time.monotonic())
        journal.append(result(row))
        time.sleep(0.008)
    watcher.join(60)
    waits_s = np.array(synced_s) - np.array(appended_s)
    assert waits_s.max() < 1.0 + sum(stalls_s), "a busy machine holds up all threads alike"
    assert len(set(synced_s)) < 30, "rows are synced in batches"
    journal.close()


class HeldDisk(FileSystem):
    def __init__(self) -> None:
        self.is_released = threading.Event()

    def sync(self, fd: int) -> None:
        self.is_released.wait(60)
        super().sync(fd)


def test_append_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    disk = HeldDisk()
    disk.is_released.set()
    journal = JournalWriter(tmp_path, 1, 0, files=disk)
    disk.is_released.clear()
    for row in range(300):
        journal.append(result(row))
    assert journal.num_synced_rows == 0
    disk.is_released.set()
    wait_for(lambda: journal.num_synced_rows == 300)
    journal.close()


def test_sync_and_close_wait_for_the_disk(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path, 1, 0, sync_interval_s=NEVER_S)
    journal.sync()
    journal.append(result(0))
    journal.raise_if_failed()
    assert journal.num_synced_rows == 0
    journal.sync()
    assert journal.num_synced_rows == 1 and len(index_journal(tmp_path)) == 1
    assert not journal._flush_requested, "the next results share a sync again"
    journal.append(result(1))
    journal.close()
    journal.close()
    assert journal.num_synced_rows == 2 and read_segment(journal.path).is_sealed


def test_what_is_sealed_can_be_read_and_the_next_result_begins_another_segment(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path, 1, 0, sync_interval_s=NEVER_S)
    journal.append(result(0))
    journal.seal()
    [sealed] = journal.paths
    assert read_segment(sealed).is_sealed and read(tmp_path) == {0: result(0)}
    journal.append(result(1))
    journal.close()
    assert len(journal.paths) == 2 and sealed == journal.paths[0]
    assert read(tmp_path) == {0: result(0), 1: result(1)}


def test_a_closed_journal_is_sealed_already(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path, 1, 0)
    journal.append(result(0))
    journal.close()
    journal.seal()
    assert read_segment(journal.path).is_sealed


@pytest.mark.parametrize("how", [None, "EACCES"])
def test_a_segment_without_rows_is_removed_at_the_end_if_it_can_be(tmp_path: Path, how: str | None) -> None:
    disk = FailingDisk(3, how)  # after create, sync_directory and close
    journal = JournalWriter(tmp_path, 1, 0, files=disk)
    assert list_segments(tmp_path) == [journal.path], "its name is reserved while the rank runs"
    journal.close()
    assert disk.calls == ["create", "sync_directory", "close", "remove"]
    assert list_segments(tmp_path) == journal.paths == ([] if how is None else [journal.path])


# ---- a failing disk


FAILURES = ["ENOSPC", "EIO", "EDQUOT", "EROFS"]


def run_scenario(directory: Path, disk: FileSystem, attempt: int = 1) -> tuple[int, str | None]:
    """Write 12 rows in batches and several segments; return the number of rows reported as safe, and the error."""
    journal = None
    try:
        journal = JournalWriter(directory, attempt, 0, segment_bytes=300, sync_interval_s=NEVER_S, files=disk)
        for row in range(12):
            journal.append(result(row, f"text {row}"))
            if row % 2:
                journal.sync()
        journal.close()
    except DpgenError as error:
        if journal is None:
            return 0, str(error)
        synced = journal.num_synced_rows
        for again in (lambda: journal.append(result(99)), journal.raise_if_failed, journal.sync):
            with pytest.raises(DpgenError, match="can't be written"):
                again()
        assert journal.num_synced_rows == synced, "nothing is written again"
        return synced, str(error)
    except Crash:
        return 0, "crash"
    return journal.num_synced_rows, None


def list_scenario_calls(tmp_path: Path) -> list[str]:
    disk = FailingDisk()
    (tmp_path / "undisturbed").mkdir()
    assert run_scenario(tmp_path / "undisturbed", disk) == (12, None)
    assert {"create", "write", "sync", "close", "sync_directory"} == set(disk.calls)
    return disk.calls


def check_recovery(directory: Path, num_safe: int) -> None:
    """Assert that every safe row is there, that no row is wrong, and that the next attempt completes the rows."""
    kept = read(directory)
    expected = {row: result(row, f"text {row}") for row in range(12)}
    assert set(kept) >= set(range(num_safe)) and kept.items() <= expected.items()
    assert all(read_segment(path, check=True).damage is None for path in list_segments(directory))
    write_sealed(directory, [expected[row] for row in range(12) if row not in kept], attempt=2)
    assert read(directory) == expected


def test_a_failure_of_any_system_call_is_an_error_and_loses_no_safe_row(tmp_path: Path) -> None:
    calls = list_scenario_calls(tmp_path)
    for at, call in enumerate(calls):
        for how in FAILURES:
            directory = tmp_path / f"{at}-{how}"
            directory.mkdir()
            disk = FailingDisk(at, how)
            num_safe, error = run_scenario(directory, disk)
            assert error is not None, f"{call} {at} failed with {how}, but no error was raised"
            assert os.strerror(getattr(errno, how)) in error and "rerun the same command" in error
            assert ".journal can't be written" in error, "the message names the file"
            later_calls = disk.calls[at + 1 :]
            assert set(later_calls) <= {"close"}, f"after a failed {call} came {later_calls}"
            check_recovery(directory, num_safe)


def test_a_short_write_anywhere_is_continued(tmp_path: Path) -> None:
    for at, call in enumerate(list_scenario_calls(tmp_path)):
        if call == "write":
            directory = tmp_path / f"{at}"
            directory.mkdir()
            assert run_scenario(directory, FailingDisk(at, "short")) == (12, None)
            check_recovery(directory, 12)


@pytest.mark.parametrize("kept", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("filler", [None, b"\0", b"\xa5"])
def test_a_power_failure_around_any_system_call_loses_no_safe_row(
    tmp_path: Path, kept: float, filler: bytes | None
) -> None:
    for at, _ in enumerate(list_scenario_calls(tmp_path)):
        for how in ("before", "after"):
            directory = tmp_path / f"{at}-{how}"
            directory.mkdir()
            disk = FailingDisk(at, how)
            num_safe, error = run_scenario(directory, disk)
            assert error is not None
            disk.lose_power(kept, filler)
            check_recovery(directory, num_safe)


def test_a_segment_is_repaired_in_full_or_not_at_all(tmp_path: Path) -> None:
    original = write_sealed(tmp_path, [result(row) for row in range(5)])
    content = bytearray(original.read_bytes())
    content[int(read_segment(original).frames.offset[2])] ^= 1
    disk, at = FailingDisk(), 0
    while True:
        directory = tmp_path / str(at)
        directory.mkdir()
        path = directory / original.name
        path.write_bytes(content)
        disk = FailingDisk(at, "EIO")
        try:
            repair_segment(path, disk)
            break
        except DpgenError:
            pass
        assert sorted(read(directory)) == [0, 1, 3, 4], "the sound rows are there before and after the repair"
        assert repair_segment(path) == [2] or disk.calls[-1] == "sync_directory"
        assert sorted(index_journal(directory).row) == [0, 1, 3, 4]
        at += 1
    assert {"create", "write", "sync", "close", "link", "replace", "sync_directory"} == set(disk.calls)


def test_a_batch_waits_from_its_first_result_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(time, "monotonic", clock)
    batch = WriteBatch()
    for clock.now_s in (5.0, 6.0, 7.0):
        batch.add(1, 0, b"payload")
    assert batch.first_append_s == 5.0


class UnwillingDisk(FailingDisk):
    """Write nothing at the first call, without an error."""

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        if "write" in self.calls:
            return super().write(fd, data)
        self.calls.append("write")
        return 0


def test_a_disk_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    num_safe, error = run_scenario(tmp_path, UnwillingDisk())
    assert (
        num_safe == 0 and error is not None and re.search(r"can't be written: the system wrote 0 of \d+ bytes", error)
    )


class DyingDisk(FailingDisk):
    """Fail at call number `at`, and at every close afterwards."""

    def close(self, fd: int) -> None:
        super().close(fd)
        if len(self.calls) > self.at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_first_failure_is_the_error_if_the_disk_then_fails_to_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    others, tracebacks = set(threading.enumerate()), list[object]()
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    num_safe, error = run_scenario(tmp_path, DyingDisk(at, "ENOSPC"))
    assert num_safe == 0 and error is not None and "can't be written: No space left" in error
    for thread in set(threading.enumerate()) - others:
        thread.join(60)
    assert not tracebacks


def test_a_segment_is_closed_once(tmp_path: Path) -> None:
    disk = FailingDisk()
    segment = SegmentWriter(tmp_path / "segment", disk, lambda num_bytes: None)
    segment.abandon()
    assert disk.calls.count("close") == 1
    segment.abandon()
    assert disk.calls.count("close") == 1, "another file may have the same descriptor by now"


def test_an_error_in_the_thread_is_raised_by_the_next_call(tmp_path: Path) -> None:
    disk = FailingDisk(2, "EIO")
    journal = JournalWriter(tmp_path, 1, 0, sync_interval_s=0.01, files=disk)
    journal.append(result(0))
    time.sleep(0.5)
    with pytest.raises(DpgenError, match=r"Input/output error.*rerun the same command"):
        journal.raise_if_failed()
    with pytest.raises(DpgenError, match="Input/output error"):
        journal.close()
    journal.close()


def test_a_disk_that_does_not_respond_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    response = threading.Event()

    class HungDisk(FileSystem):
        def sync(self, fd: int) -> None:
            response.wait(60)

    monkeypatch.setattr(writer, "_STALLED_S", 0.2)
    journal = JournalWriter(tmp_path, 1, 0, sync_interval_s=0, files=HungDisk())
    journal.append(result(0))
    time.sleep(0.5)
    with pytest.raises(DpgenError, match="the disk has not responded for"):
        journal.raise_if_failed()
    response.set()


def test_append_waits_if_the_disk_is_far_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_MAX_QUEUED_BYTES", 1000)
    monkeypatch.setattr(writer, "_BATCH_BYTES", 500)
    journal = JournalWriter(tmp_path, 1, 0, files=SlowDisk())
    for row in range(30):
        journal.append(result(row, "x" * 100))
        assert len(journal._queued.data) < 1300
    journal.close()
    assert len(index_journal(tmp_path)) == 30


def test_two_attempts_at_once_write_separate_segments(tmp_path: Path) -> None:
    """Cover a process of an earlier attempt that survives and still writes while the next attempt runs."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dpgen.journal.writer import JournalWriter\n"
        "from dpgen.records import *\n"
        "journal = JournalWriter(Path(sys.argv[1]), int(sys.argv[2]), 0)\n"
        "for row in range(500): journal.append(RowResult(row, 1, (Completion(sys.argv[2], 'stop', 1),)))\n"
        "journal.close()\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), attempt]) for attempt in "12"]
    assert [process.wait(60) for process in writers] == [0, 0]
    assert {kept.completions[0].text for kept in read(tmp_path).values()} == {"1"}


@pytest.mark.slow
@pytest.mark.multi
def test_a_run_whose_journal_cant_grow_stops_and_can_be_resumed(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3000))
    command = f"ulimit -f 96; exec {sys.executable} -m dpgen run {conf}"
    full = launcher.start(["bash", "-c", command])
    assert full.wait() == 1, full.output
    assert "can't be written: File too large" in full.output and "Traceback" not in full.output, full.output
    again = launcher.dpgen("run", conf)
    assert again.wait() == 0, again.output
    assert "attempt 2" in again.output
    assert [row["row_id"] for row in load_result(tmp_path / "run")] == list(range(3000))
