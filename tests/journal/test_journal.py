"""The journal: what was synced is read back, what was torn or damaged is not, and a row counts once."""

from __future__ import annotations

import contextlib
import errno
import os
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
from helpers.jobs import Launcher, load_result, make_numbered_rows
from helpers.journal_disk import Crash, FailingDisk
from hypothesis import given, settings
from hypothesis import strategies as st

from dpgen.errors import DpgenError, RowRefused
from dpgen.journal import writer
from dpgen.journal.files import FileSystem
from dpgen.journal.reader import (
    DamagedRecord,
    JournalReader,
    index_journal,
    last_attempt,
    list_segments,
    merge_segments,
    read_segment,
)
from dpgen.journal.segment import repair_segment
from dpgen.journal.writer import JournalWriter
from dpgen.records import Completion, RowResult, decode_result, encode_result, make_rejected_result

NEVER_S = 1e6


def result(row: int, text: str = "hello") -> RowResult:
    return RowResult(row, 3, (Completion(text, "stop", 2),))


def written(folder: Path, results: Sequence[RowResult], attempt: int = 1, rank: int = 0, **options: Any) -> Path:
    log = JournalWriter(folder, attempt, rank, **options)
    for each in results:
        log.append(each)
    log.close()
    return log.path


def unsealed(folder: Path, results: Sequence[RowResult], attempt: int = 1, rank: int = 0) -> Path:
    """A segment as a killed writer leaves it."""
    path = written(folder, results, attempt, rank)
    found = read_segment(path).frames
    os.truncate(path, int(found.offset[-1] + found.length[-1]))
    return path


def read(folder: Path) -> dict[int, RowResult]:
    """What a journal holds, without the records that turn out damaged."""
    found, index = {}, index_journal(folder)
    with JournalReader(index) as reader:
        for place in range(len(index)):
            with contextlib.suppress(DamagedRecord):
                found[int(index.row[place])] = reader.result(place)
    return found


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for one example of a property test."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


TEXTS = ["", "plain", "ünïcode 漢字 🎉", "null \0 byte", "lone \ud800 surrogate", "line\nbreak", "x" * 100_000]
results_of_any_kind = st.lists(
    st.one_of(
        st.builds(result, st.integers(0, 20), st.text(max_size=30)),
        st.builds(lambda row: make_rejected_result(row, RowRefused("bad", "it was bad")), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=12,
)


# ---- what is written is read


def test_everything_comes_back(tmp_path: Path) -> None:
    results = [result(row, text) for row, text in enumerate(TEXTS)]
    results.append(make_rejected_result(50, RowRefused("empty_prompt", "nothing")))
    results.append(RowResult(51, 1, (Completion("a", "stop", 1, [5]), Completion("b", None, 2, [6, 7]))))
    written(tmp_path, results)
    assert read(tmp_path) == {each.row: each for each in results}
    assert all(decode_result(encode_result(each)) == each for each in results)


def test_a_large_journal_is_several_sealed_segments(tmp_path: Path) -> None:
    log = JournalWriter(tmp_path, 1, 0, segment_bytes=1000)
    for row in range(100):
        log.append(result(row))
        if row % 5 == 4:
            log.sync()
    log.close()
    assert log.paths == list_segments(tmp_path) and len(log.paths) > 5
    assert log.num_rows == log.num_synced_rows == 100
    assert log.num_bytes == sum(path.stat().st_size for path in log.paths)
    assert all(read_segment(path).is_sealed for path in log.paths)
    assert read(tmp_path) == {row: result(row) for row in range(100)}


def test_a_sealed_segment_is_scanned_without_its_payloads(tmp_path: Path) -> None:
    path = written(tmp_path, [result(row, "x" * 100_000) for row in range(20)])
    content = bytearray(path.read_bytes())
    content[1000:1_900_000] = bytes(1_899_000)
    path.write_bytes(content)
    assert list(index_journal(tmp_path).row) == list(range(20)), "the index alone says what is there"
    assert sorted(read(tmp_path)) == [19], "but nothing unsound is given out"
    found = read_segment(path, check=True)
    assert found.damage is not None and "19 damaged records, the first at byte 24 (row 0)" in found.damage


def test_a_scan_keeps_few_bytes_a_row(tmp_path: Path) -> None:
    written(tmp_path, [result(row) for row in range(1000)])
    index = index_journal(tmp_path)
    arrays = (index.row, index.file, index.offset, index.length, index.error)
    assert sum(each.nbytes for each in arrays) == 25 * 1000


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    for rank in range(150):
        written(tmp_path, [result(rank)], rank=rank)
    index = index_journal(tmp_path)
    with JournalReader(index) as reader:
        before = len(os.listdir("/proc/self/fd"))
        assert [reader.result(place).row for place in range(150)] == list(range(150))
        assert len(os.listdir("/proc/self/fd")) - before <= 64
        assert reader.result(0).row == 0


# ---- what is torn or damaged


@settings(deadline=None, max_examples=60)
@given(results=results_of_any_kind, at=st.floats(0, 1))
def test_any_truncation_keeps_the_rows_before_it(results: list[RowResult], at: float) -> None:
    results = [RowResult(row, each.num_prompt_tokens, each.completions) for row, each in enumerate(results)]
    with folder() as path:
        segment = written(path, results)
        size = int(segment.stat().st_size * at)
        os.truncate(segment, size)
        found = read_segment(segment, check=True)
        assert found.damage is None, "a crash can leave this, and does no harm"
        kept = read(path)
        assert kept == {each.row: each for each in results[: len(kept)]}
        ends = found.frames.offset + found.frames.length
        assert (ends <= size).all()


def test_every_truncation_of_one_journal(tmp_path: Path) -> None:
    path = written(tmp_path, [result(row) for row in range(4)])
    ends = read_segment(path).frames.offset + read_segment(path).frames.length
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert list(index_journal(tmp_path).row) == list(range(int((ends <= size).sum())))


@pytest.mark.parametrize("write", [written, unsealed])
def test_every_damaged_byte(tmp_path: Path, write: Callable[[Path, list[RowResult]], Path]) -> None:
    """No wrong row is given; a sealed segment loses at most the row that was hit, and says so."""
    results = {row: result(row, f"text {row}") for row in range(4)}
    path = write(tmp_path, list(results.values()))
    frames = read_segment(path).frames
    end_of_rows = int(frames.offset[-1] + frames.length[-1])
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        kept = read(tmp_path)
        assert kept.items() <= results.items()
        segment = read_segment(path, check=True)
        assert set(segment.frames.row) == set(kept), "both ways of reading see the same rows"
        if write is written:
            assert len(kept) == 4 if place >= end_of_rows or place < 24 else len(kept) == 3 or not segment.is_sealed
            assert segment.damage is not None or segment.torn_bytes or 0 <= place < 24
        elif 24 <= place < frames.offset[3] - 17:
            assert segment.damage is not None, "sound frames after the bad one: no crash does that"


@settings(deadline=None, max_examples=100)
@given(
    results=results_of_any_kind,
    is_sealed=st.booleans(),
    at=st.floats(0, 1, exclude_max=True),
    change=st.integers(1, 255),
)
def test_any_damaged_byte_never_gives_a_wrong_row(
    results: list[RowResult], is_sealed: bool, at: float, change: int
) -> None:
    with folder() as path:
        segment = (written if is_sealed else unsealed)(path, results)
        content = bytearray(segment.read_bytes())
        content[int(len(content) * at)] ^= change
        segment.write_bytes(content)
        assert all(found in results for found in read(path).values())
        repair_segment(segment)
        index = index_journal(path)
        with JournalReader(index) as reader:
            found = {reader.result(place).row: reader.result(place) for place in range(len(index))}
        assert all(each in results for each in found.values()), "after mending every record reads"


def test_what_a_crash_leaves_behind_is_no_damage(tmp_path: Path) -> None:
    path = unsealed(tmp_path, [result(row) for row in range(4)])
    whole = path.read_bytes()
    for tail in (b"\0" * 5000, b"\xff" * 5000, b"abc", whole[24:60]):
        path.write_bytes(whole + tail)
        found = read_segment(path, check=True)
        assert found.damage is None and found.torn_bytes == len(tail) and len(found.frames) == 4
    for beginning in (b"", b"\0" * 100, whole[:10], whole[:20]):
        path.write_bytes(beginning)
        assert read_segment(path, check=True).damage is None and not read(tmp_path)


def test_an_index_of_another_segment_is_not_believed(tmp_path: Path) -> None:
    path = written(tmp_path, [result(row) for row in range(3)])
    other = written(tmp_path / "..", [result(row) for row in (7, 8, 9)], attempt=77)
    end = int(read_segment(path).frames.offset[-1] + read_segment(path).frames.length[-1])
    path.write_bytes(path.read_bytes()[:end] + other.read_bytes()[end:])
    assert sorted(read(tmp_path)) == [0, 1, 2]
    assert read_segment(path, check=True).damage is not None


def test_rows_of_an_index_cut_off_from_frames_are_not_believed(tmp_path: Path) -> None:
    path = written(tmp_path, [result(row) for row in range(3)])
    frames = read_segment(path).frames
    content = path.read_bytes()
    path.write_bytes(content[: int(frames.offset[0]) - 17] + content[int(frames.offset[1]) - 17 :])
    assert sorted(read(tmp_path)) == [1, 2]


def test_a_damaged_segment_is_mended_and_kept(tmp_path: Path) -> None:
    path = written(tmp_path, [result(row) for row in range(5)])
    assert repair_segment(path) == []
    content = bytearray(path.read_bytes())
    content[int(read_segment(path).frames.offset[2]) + 3] ^= 1
    path.write_bytes(content)
    assert repair_segment(path) == [2]
    assert read(tmp_path) == {row: result(row) for row in (0, 1, 3, 4)}
    assert len(index_journal(tmp_path)) == 4, "row 2 counts as missing, so that it is generated anew"
    assert read_segment(path, check=True).damage is None
    assert (tmp_path / f"{path.name}.damaged").read_bytes() == content
    assert repair_segment(path) == []


def test_a_segment_that_cant_be_read_stops_the_scan(tmp_path: Path) -> None:
    (tmp_path / "attempt-0001-rank-00000-part-0000.journal").mkdir()
    with pytest.raises(DpgenError, match=r"part-0000.journal can't be read: .*mend the disk"):
        index_journal(tmp_path)


# ---- a row counts once


def test_a_row_counts_once_a_completion_before_an_error_then_the_earlier(tmp_path: Path) -> None:
    written(
        tmp_path, [make_rejected_result(0, RowRefused("x", "y")), result(1, "early"), result(2, "rank 0")], attempt=1
    )
    written(tmp_path, [result(2, "rank 1")], attempt=1, rank=1)
    written(tmp_path, [result(0, "late"), result(1, "late")], attempt=2)
    texts = {row: found.completions[0].text for row, found in read(tmp_path).items()}
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
def test_any_order_of_segments_and_any_interleaving(
    writers: dict[tuple[int, int], list[RowResult]], data: st.DataObject
) -> None:
    """Whatever the order in which attempts and ranks write: completion, attempt, rank, place decide."""
    turns = data.draw(st.permutations([key for key, results in writers.items() for _ in results]))
    with folder() as path:
        logs = {
            key: JournalWriter(path, *key, segment_bytes=150, sync_interval_s=NEVER_S)
            for key in data.draw(st.permutations(list(writers)))
        }
        waiting = {key: list(results) for key, results in writers.items()}
        for key in turns:
            logs[key].append(waiting[key].pop(0))
            if data.draw(st.booleans()):
                logs[key].sync()
        for log in logs.values():
            log.close()
        expected: dict[int, RowResult] = {}
        in_order = [each for key in sorted(writers) for each in writers[key]]
        for each in sorted(in_order, key=lambda found: found.error is not None):
            expected.setdefault(each.row, each)
        assert read(path) == expected
        found = [read_segment(segment, check=True) for segment in list_segments(path)]
        shuffled, index = merge_segments(data.draw(st.permutations(found))), index_journal(path)
        for name in ("row", "file", "offset", "length", "error"):
            np.testing.assert_array_equal(getattr(shuffled, name), getattr(index, name))


def test_nothing_is_appended_to_another_attempts_file(tmp_path: Path) -> None:
    written(tmp_path, [result(0)])
    with pytest.raises(DpgenError, match="can't be written: File exists"):
        JournalWriter(tmp_path, 1, 0)


# ---- within a second


class SlowDisk(FileSystem):
    def sync(self, fd: int) -> None:
        time.sleep(0.2)
        super().sync(fd)


def test_a_row_is_on_the_disk_within_a_second_though_syncs_are_slow(tmp_path: Path) -> None:
    log = JournalWriter(tmp_path, 1, 0, files=SlowDisk())
    appended_s: list[float] = []
    synced_s: list[float] = []

    def watch() -> None:
        while len(synced_s) < 300:
            synced_s.extend([time.monotonic()] * (log.num_synced_rows - len(synced_s)))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for row in range(300):
        appended_s.append(time.monotonic())
        log.append(result(row))  # and never a tick
        time.sleep(0.008)
    watcher.join(10)
    waits_s = np.array(synced_s) - np.array(appended_s)
    assert waits_s.max() < 1.0
    assert max(np.diff(appended_s)) < 0.15, "nobody waits for the disk"
    assert len(set(synced_s)) < 10, "rows are synced in groups"
    log.close()


def test_sync_and_close_wait_for_the_disk(tmp_path: Path) -> None:
    log = JournalWriter(tmp_path, 1, 0, sync_interval_s=NEVER_S)
    log.sync()
    log.append(result(0))
    log.raise_if_failed()
    assert log.num_synced_rows == 0
    log.sync()
    assert log.num_synced_rows == 1 and len(index_journal(tmp_path)) == 1
    log.append(result(1))
    log.close()
    log.close()
    assert log.num_synced_rows == 2 and read_segment(log.path).is_sealed


# ---- a broken disk


FAILURES = ["ENOSPC", "EIO", "EDQUOT", "EROFS"]


def scenario(folder: Path, disk: FileSystem, attempt: int = 1) -> tuple[int, str | None]:
    """Writes 12 rows in groups and several segments; how many were promised safe, and the error that came."""
    log = None
    try:
        log = JournalWriter(folder, attempt, 0, segment_bytes=300, sync_interval_s=NEVER_S, files=disk)
        for row in range(12):
            log.append(result(row, f"text {row}"))
            if row % 2:
                log.sync()
        log.close()
    except DpgenError as error:
        if log is None:
            return 0, str(error)
        synced = log.num_synced_rows
        for again in (lambda: log.append(result(99)), log.raise_if_failed, log.sync):
            with pytest.raises(DpgenError, match="can't be written"):
                again()
        assert log.num_synced_rows == synced, "nothing is tried again"
        return synced, str(error)
    except Crash:
        return 0, "crash"
    return log.num_synced_rows, None


def calls_of_the_scenario(tmp_path: Path) -> list[str]:
    disk = FailingDisk()
    (tmp_path / "undisturbed").mkdir()
    assert scenario(tmp_path / "undisturbed", disk) == (12, None)
    assert {"create", "write", "sync", "close", "sync_folder"} == set(disk.calls)
    return disk.calls


def check_recovery(folder: Path, promised: int) -> None:
    """Every promised row is there, none is wrong; and the next attempt completes the rows."""
    kept = read(folder)
    expected = {row: result(row, f"text {row}") for row in range(12)}
    assert set(kept) >= set(range(promised)) and kept.items() <= expected.items()
    assert all(segment.damage is None for segment in (read_segment(each, check=True) for each in list_segments(folder)))
    written(folder, [expected[row] for row in range(12) if row not in kept], attempt=2)
    assert read(folder) == expected


def test_every_call_of_the_commit_path_failed_in_turn(tmp_path: Path) -> None:
    calls = calls_of_the_scenario(tmp_path)
    for at, call in enumerate(calls):
        for how in FAILURES:
            folder = tmp_path / f"{at}-{how}"
            folder.mkdir()
            disk = FailingDisk(at, how)
            promised, error = scenario(folder, disk)
            assert error is not None, f"{call} {at} failed with {how}, and nobody was told"
            assert os.strerror(getattr(errno, how)) in error and "run the same command again" in error
            assert ".journal can't be written" in error, "it names the file"
            later = disk.calls[at + 1 :]
            assert set(later) <= {"close"}, f"after a failed {call} came {later}"
            check_recovery(folder, promised)


def test_every_write_of_the_commit_path_cut_short_in_turn(tmp_path: Path) -> None:
    for at, call in enumerate(calls_of_the_scenario(tmp_path)):
        if call == "write":
            folder = tmp_path / f"{at}"
            folder.mkdir()
            assert scenario(folder, FailingDisk(at, "short")) == (12, None)
            check_recovery(folder, 12)


@pytest.mark.parametrize("kept", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("filler", [None, b"\0", b"\xa5"])
def test_power_lost_around_every_call_of_the_commit_path(tmp_path: Path, kept: float, filler: bytes | None) -> None:
    for at, _ in enumerate(calls_of_the_scenario(tmp_path)):
        for how in ("before", "after"):
            folder = tmp_path / f"{at}-{how}"
            folder.mkdir()
            disk = FailingDisk(at, how)
            promised, error = scenario(folder, disk)
            assert error is not None
            disk.lose_power(kept, filler)
            check_recovery(folder, promised)


def test_a_segment_is_mended_whole_or_not_at_all(tmp_path: Path) -> None:
    original = written(tmp_path, [result(row) for row in range(5)])
    content = bytearray(original.read_bytes())
    content[int(read_segment(original).frames.offset[2])] ^= 1
    disk, at = FailingDisk(), 0
    while True:
        folder = tmp_path / str(at)
        folder.mkdir()
        path = folder / original.name
        path.write_bytes(content)
        disk = FailingDisk(at, "EIO")
        try:
            repair_segment(path, disk)
            break
        except DpgenError:
            pass
        assert sorted(read(folder)) == [0, 1, 3, 4], "before or after, the sound rows are there"
        assert repair_segment(path) == [2] or disk.calls[-1] == "sync_folder"
        assert sorted(index_journal(folder).row) == [0, 1, 3, 4]
        at += 1
    assert {"create", "write", "sync", "close", "link", "replace", "sync_folder"} == set(disk.calls)


def test_what_breaks_beside_the_caller_reaches_it_at_the_next_tick(tmp_path: Path) -> None:
    disk = FailingDisk(2, "EIO")
    log = JournalWriter(tmp_path, 1, 0, sync_interval_s=0.01, files=disk)
    log.append(result(0))
    time.sleep(0.5)
    with pytest.raises(DpgenError, match=r"Input/output error.*run the same command again"):
        log.raise_if_failed()
    with pytest.raises(DpgenError, match="Input/output error"):
        log.close()
    log.close()


def test_a_disk_that_no_longer_answers_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    class Dead(FileSystem):
        def sync(self, fd: int) -> None:
            answer.wait(60)

    monkeypatch.setattr(writer, "_STALLED_S", 0.2)
    log = JournalWriter(tmp_path, 1, 0, sync_interval_s=0, files=Dead())
    log.append(result(0))
    time.sleep(0.5)
    with pytest.raises(DpgenError, match="the disk has not answered for"):
        log.raise_if_failed()
    answer.set()


def test_the_caller_waits_where_the_disk_is_far_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_MAX_QUEUED_BYTES", 1000)
    monkeypatch.setattr(writer, "_BATCH_BYTES", 500)
    log = JournalWriter(tmp_path, 1, 0, files=SlowDisk())
    for row in range(30):
        log.append(result(row, "x" * 100))
        assert len(log._waiting.data) < 1300
    log.close()
    assert len(index_journal(tmp_path)) == 30


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    """A zombie of an earlier attempt goes on writing while the next attempt does: each to its own."""
    script = (
        "import sys; from pathlib import Path; from dpgen.journal.writer import JournalWriter; from dpgen.records import *\n"
        "log = JournalWriter(Path(sys.argv[1]), int(sys.argv[2]), 0)\n"
        "for row in range(500): log.append(RowResult(row, 1, (Completion(sys.argv[2], 'stop', 1),)))\n"
        "log.close()\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), attempt]) for attempt in "12"]
    assert [each.wait(60) for each in running] == [0, 0]
    assert {each.completions[0].text for each in read(tmp_path).values()} == {"1"}


@pytest.mark.multi
def test_a_run_whose_journal_cant_grow_stops_and_goes_on_later(
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
