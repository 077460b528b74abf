"""Rejected attempts in a journal: no row is done by them, no reader of results sees them, and repairs keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpgen.distributed.group import SingleRankGroup
from dpgen.journal.attempts import RejectedAttempt, Rejection, decode_attempt, encode_attempt
from dpgen.journal.calls import AskedText, FinishedCall, decode_call, encode_call
from dpgen.journal.reader import index_attempts, index_journal, list_segments, read_segment
from dpgen.journal.segment import repair_segment
from dpgen.journal.writer import JournalWriter
from dpgen.records import Completion, RequestId, RowError, RowResult
from dpgen.scheduling.retries.earlier_attempts import AttemptStore


def make_result(row: int, text: str = "text") -> RowResult:
    return RowResult(row, 3, (Completion(text, "stop", 2),))


def make_attempt(row: int, number: int, sample: int = 0) -> RejectedAttempt:
    result = make_result(row, f"bad {number}").with_id(RequestId(row, 0, sample, number))
    return RejectedAttempt(result, (Rejection("regex", "it is found nowhere"),))


def write(folder: Path, job_attempt: int, *records: RowResult | RejectedAttempt, rank: int = 0) -> JournalWriter:
    journal = JournalWriter(folder, job_attempt, rank)
    for record in records:
        if isinstance(record, RowResult):
            journal.append(record)
        else:
            journal.append_attempt(record.id.row, encode_attempt(record))
    journal.close()
    return journal


def select_all(rows: np.ndarray) -> np.ndarray:
    return np.ones(len(rows), dtype=bool)


def read_store(folder: Path, *done: int) -> AttemptStore:
    store, is_done = AttemptStore(folder, SingleRankGroup(), decode_attempt), np.zeros(10, dtype=bool)
    is_done[list(done)] = True
    store.read(is_done)
    return store


def test_an_attempt_makes_no_row_done(tmp_path: Path) -> None:
    journal = write(tmp_path, 1, make_attempt(1, 0), make_result(2), make_attempt(1, 1), make_attempt(3, 0))
    assert (journal.num_rows, journal.num_synced_rows) == (1, 1), "only results count as rows"
    assert index_journal(tmp_path).row.tolist() == [2]
    attempts, last_results = index_attempts(tmp_path, select_all)
    assert attempts.row.tolist() == [1, 1, 3] and last_results == {2: 1}


def test_attempts_are_found_in_a_segment_that_was_never_sealed(tmp_path: Path) -> None:
    write(tmp_path, 1, make_attempt(1, 0), make_result(2))
    [path] = list_segments(tmp_path)
    frames = read_segment(path).frames
    path.write_bytes(path.read_bytes()[: int(frames.offset[-1] + frames.length[-1])])
    assert not read_segment(path).is_sealed
    assert index_attempts(tmp_path, select_all)[0].row.tolist() == [1] and index_journal(tmp_path).row.tolist() == [2]


def test_a_repaired_segment_keeps_its_attempts(tmp_path: Path) -> None:
    write(tmp_path, 1, make_attempt(1, 0), make_result(2), make_result(4), make_attempt(3, 0))
    [path] = list_segments(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(read_segment(path).frames.offset[1]) + 3] ^= 1
    path.write_bytes(content)
    assert repair_segment(path) == [2], "only a result is lost"
    assert index_journal(tmp_path).row.tolist() == [4]
    assert index_attempts(tmp_path, select_all)[0].row.tolist() == [1, 3]


def test_a_row_without_a_result_continues_from_its_attempts(tmp_path: Path) -> None:
    write(tmp_path, 1, make_attempt(1, 0), make_attempt(2, 0), make_result(2))
    write(tmp_path, 2, make_attempt(1, 1, sample=0), rank=3)
    store = read_store(tmp_path, 2)
    earlier = store.find(1)
    assert earlier is not None and earlier.first == 0
    assert earlier.current == [make_attempt(1, 0), make_attempt(1, 1)]
    assert store.find(2) is None and store.find(5) is None


def test_another_try_after_an_error_begins_with_the_next_number(tmp_path: Path) -> None:
    failed = RowResult(1, error=RowError("check_failed", "regex"))
    write(tmp_path, 1, make_attempt(1, 0), make_attempt(1, 1), failed)
    earlier = read_store(tmp_path).find(1)
    assert earlier is not None and (earlier.first, earlier.current) == (2, [])
    write(tmp_path, 2, make_attempt(1, 2))
    earlier = read_store(tmp_path).find(1)
    assert earlier is not None and (earlier.first, earlier.current) == (2, [make_attempt(1, 2)])
    write(tmp_path, 3, make_attempt(1, 3), failed)
    earlier = read_store(tmp_path).find(1)
    assert earlier is not None and (earlier.first, earlier.current) == (4, []), "the last error counts"


class TwoNodes(SingleRankGroup):
    """Gather what another node has before one's own."""

    def __init__(self, others: list[Any]) -> None:
        super().__init__()
        self._others = others

    def all_gather_object(self, value: Any) -> list[Any]:
        return [self._others.pop(0), *super().all_gather_object(value)]


def test_of_two_nodes_journals_the_later_record_of_a_call_counts(tmp_path: Path) -> None:
    """A program may ask something else than before a restart: what it asked last is what it asks next."""
    before, after = (make_result(1, text).with_id(RequestId(1)) for text in ("before", "after"))
    records = [
        encode_call(FinishedCall("0", AskedText.of(result.completions[0].text), result)) for result in (before, after)
    ]
    journal = JournalWriter(tmp_path, 1, 0)
    journal.append_attempt(1, records[0])
    journal.close()
    group = TwoNodes([[[], []], [[], [[2, records[1]]]]])
    store = AttemptStore(tmp_path, group, decode_call)
    store.read(np.zeros(10, dtype=bool))
    earlier = store.find(1)
    assert earlier is not None and [call.result for call in earlier.current] == [after]
