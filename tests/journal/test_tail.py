"""Read a journal while it is written: each result once, whole, and as it comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpgen.journal import tail as tail_module
from dpgen.journal.tail import JournalTail
from dpgen.journal.writer import JournalWriter
from dpgen.records import Completion, RowError, RowResult


def make_result(row: int, text: str = "text") -> RowResult:
    return RowResult(row, 1, (Completion(text, "stop", 1, None),))


def read(tail: JournalTail) -> list[RowResult]:
    return [result for results in tail.read_new() for result in results]


def test_results_are_given_once_as_they_are_written(tmp_path: Path) -> None:
    tail = JournalTail(tmp_path, 0)
    assert read(tail) == []
    writer = JournalWriter(tmp_path, 1, 0)
    for row in range(3):
        writer.append(make_result(row))
    writer.seal()
    assert read(tail) == [make_result(row) for row in range(3)] and read(tail) == []
    writer.close()
    other = JournalWriter(tmp_path, 1, 1)
    other.append(RowResult(7, 0, error=RowError("bad_sampling", "no")))
    other.close()
    assert [result.row for result in read(tail)] == [7] and read(tail) == []


def test_earlier_attempts_are_left_out(tmp_path: Path) -> None:
    for attempt in (1, 2):
        writer = JournalWriter(tmp_path, attempt, 0)
        writer.append(make_result(attempt))
        writer.close()
    assert [result.row for result in read(JournalTail(tmp_path, 1))] == [2]


def test_a_result_larger_than_a_chunk_and_one_that_is_cut_off_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail_module, "_CHUNK_BYTES", 100)
    writer = JournalWriter(tmp_path, 1, 0)
    for row in range(3):
        writer.append(make_result(row, "long " * 200))
    writer.close()
    [path] = tmp_path.glob("*.journal")
    whole = path.read_bytes()
    path.write_bytes(whole[:1500])
    tail = JournalTail(tmp_path, 0)
    assert [result.row for result in read(tail)] == [0]
    path.write_bytes(whole)
    assert [result.row for result in read(tail)] == [1, 2]
