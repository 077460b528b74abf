"""The journal: what was synced is read back, what was torn or damaged is not, and a row counts once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpgen import journal
from dpgen.errors import DpgenError, RowRefused
from dpgen.journal import Journal, scan
from dpgen.records import Completion, RowResult, decode, encode, refused


def result(row: int, text: str = "hello") -> RowResult:
    return RowResult(row, 3, (Completion(text, "stop", 2),))


def written(folder: Path, results: list[RowResult], attempt: int = 1, rank: int = 0) -> Path:
    log = Journal(folder, attempt, rank)
    for each in results:
        log.append(each)
    log.close()
    return log.path


def read(folder: Path) -> dict[int, RowResult]:
    index = scan(folder)
    found = {}
    for row, file, offset, length in zip(index.row, index.file, index.offset, index.length, strict=True):
        with index.files[file].open("rb") as opened:
            opened.seek(offset)
            found[int(row)] = decode(opened.read(length))
    return found


TEXTS = ["", "plain", "ünïcode 漢字 🎉", "null \0 byte", "lone \ud800 surrogate", "line\nbreak", "x" * 100_000]


def test_everything_comes_back(tmp_path: Path) -> None:
    results = [result(row, text) for row, text in enumerate(TEXTS)]
    results.append(refused(50, RowRefused("empty_prompt", "nothing")))
    results.append(RowResult(51, 1, (Completion("a", "stop", 1, [5]), Completion("b", None, 2, [6, 7]))))
    written(tmp_path, results)
    assert read(tmp_path) == {each.row: each for each in results}
    assert all(decode(encode(each)) == each for each in results)


def test_any_truncation_keeps_the_rows_before_it(tmp_path: Path) -> None:
    path = written(tmp_path, [result(row) for row in range(4)])
    whole = path.read_bytes()
    ends = [len(whole) * part // 4 for part in range(5)]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        found = sorted(read(tmp_path))
        assert found == list(range(len(found)))
        assert len(found) == 4 or size < len(whole)
    assert ends


def test_a_damaged_byte_never_gives_a_wrong_row(tmp_path: Path) -> None:
    results = {row: result(row, f"text {row}") for row in range(4)}
    path = written(tmp_path, list(results.values()))
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        assert read(tmp_path).items() <= results.items()


def test_a_row_counts_once_a_completion_before_an_error_then_the_earlier(tmp_path: Path) -> None:
    written(tmp_path, [refused(0, RowRefused("x", "y")), result(1, "early"), result(2, "rank 0")], attempt=1)
    written(tmp_path, [result(2, "rank 1")], attempt=1, rank=1)
    written(tmp_path, [result(0, "late"), result(1, "late")], attempt=2)
    texts = {row: found.completions[0].text for row, found in read(tmp_path).items()}
    assert texts == {0: "late", 1: "early", 2: "rank 0"}
    assert journal.last_attempt(tmp_path) == 2


def test_nothing_is_appended_to_another_attempts_file(tmp_path: Path) -> None:
    written(tmp_path, [result(0)])
    with pytest.raises(DpgenError, match="can't be written"):
        Journal(tmp_path, 1, 0)


def test_a_row_is_on_the_disk_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_size))
    log = Journal(tmp_path, 1, 0)
    log.append(result(0))
    log.tick()
    assert not synced, "rows are synced in groups"
    now[0] += 0.6
    log.tick()
    log.close()
    assert len(synced) == 2 and synced[0] > 0


def test_a_full_disk_is_an_error_not_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Journal(tmp_path, 1, 0)
    log.append(result(0))

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DpgenError, match=r"No space left on device.*run the same command again"):
        log.close()
