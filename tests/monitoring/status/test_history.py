"""A rank's history on the disk: a line at each change and every few seconds, bounded over days."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dpgen.monitoring.status.history import MAX_LINES, History, read_history


def make_sample(second: int) -> dict[str, object]:
    return {"attempt": 1, "elapsed_s": float(second), "phase": "generating", "num_rows": second + 1}


def test_the_file_stays_small_over_days_and_keeps_the_changes_of_phase(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.history.jsonl"
    history = History(path)
    history.append([{"attempt": 1, "elapsed_s": 0.0, "phase": "planning", "is_change": True}])
    num_appended = 0
    for second in range(3 * 86_400 // 5):
        if history.is_due(5.0 * second):
            history.append([make_sample(5 * second)])
            num_appended += 1
    samples = read_history(path)
    assert len(samples) <= MAX_LINES and path.stat().st_size < 300_000
    assert samples[0]["phase"] == "planning" and samples[-1]["elapsed_s"] > 3 * 86_400 - 1_000
    assert num_appended < 10_000, "samples come less often as the run gets long"
    gaps = [b["elapsed_s"] - a["elapsed_s"] for a, b in itertools.pairwise(samples)]
    assert max(gaps) < 3 * 86_400 / 100, "every part of the run keeps samples"


def test_changes_alone_can_not_fill_the_disk(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    for second in range(5 * MAX_LINES):
        history.append([{"attempt": second, "elapsed_s": float(second), "phase": "planning", "is_change": True}])
    samples = read_history(tmp_path / "h.jsonl")
    assert len(samples) <= MAX_LINES and samples[-1]["attempt"] == 5 * MAX_LINES - 1


def test_another_attempt_continues_the_file_behind_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    History(path).append([make_sample(0), make_sample(5)])
    path.write_bytes(path.read_bytes() + b'{"attempt": 1, "elaps')
    again = History(path)
    again.append([{"attempt": 2, "elapsed_s": 1.0}])
    again.append([{"attempt": 2, "elapsed_s": 6.0}])
    assert [sample["attempt"] for sample in read_history(path)] == [1, 1, 2, 2]
    assert path.read_bytes().count(b"\n") == 4


def test_samples_that_could_not_be_written_come_later(tmp_path: Path) -> None:
    path = tmp_path / "status" / "h.jsonl"
    history = History(path)
    with pytest.raises(OSError):
        history.append([make_sample(0)])
    path.parent.mkdir()
    history.append([make_sample(5)])
    assert [sample["elapsed_s"] for sample in read_history(path)][-1] == 5 and len(read_history(path)) == 2
