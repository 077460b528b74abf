"""Notes of the rows that ranks work on: what a dead process leaves, and which rows are blamed for it."""

from __future__ import annotations

import logging
import mmap
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.jobs import REPO

from dpgen.journal.reader import last_attempt
from dpgen.journal.row_notes import (
    DECODING,
    ORDERING,
    RENDERING,
    RowDeath,
    RowNote,
    decode_overdue,
    decode_word,
    judge_rows,
    open_note,
    read_deaths,
    remove_notes,
)


def has_no_result(row: int) -> bool:
    return False


def die_on(journal_dir: Path, attempt: int, rank: int, row: int, stage: int = RENDERING) -> None:
    """Leave the note of a process that died on a row."""

    def read_meanwhile(note: RowNote) -> bytes:
        return next(journal_dir.glob(note.name)).read_bytes()

    note = open_note(journal_dir, attempt, rank)
    words = note.run(stage, row, read_meanwhile, note)
    (journal_dir / note.name).write_bytes(words)


def test_the_note_of_a_killed_process_names_the_row_that_it_rendered(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from dpgen.journal.row_notes import *\n"
        "note = open_note(Path(sys.argv[1]), 2, 3)\n"
        "note.run(RENDERING, 70, str, 'a row that is rendered')\n"
        "note.run(RENDERING, 1 << 40, lambda _: os.kill(os.getpid(), signal.SIGKILL), None)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_deaths(tmp_path, [], has_no_result) == [RowDeath(2, 3, 1 << 40, RENDERING)]
    assert last_attempt(tmp_path) == 2, "the next attempt's notes have other names"


def test_a_rank_that_works_on_no_row_leaves_nothing(tmp_path: Path) -> None:
    note = open_note(tmp_path, 1, 0)
    with pytest.raises(ZeroDivisionError):
        note.run(RENDERING, 5, lambda number: 1 // number, 0)
    assert read_deaths(tmp_path, [note.name], has_no_result) == []
    assert (tmp_path / note.name).exists(), "this rank is alive"
    assert read_deaths(tmp_path, [], has_no_result) == []
    assert not (tmp_path / note.name).exists(), "it died between two rows"


def test_a_note_says_nothing_before_and_after_a_row(tmp_path: Path) -> None:
    for note in (open_note(tmp_path, 1, 0), RowNote()):
        assert note.read() == 0
        assert decode_word(note.run(DECODING, 1 << 40, lambda note: note.read(), note)) == (1 << 40, DECODING)
        assert note.read() == 0, "else the time between two rows would count as a row's"


def test_a_rank_that_ends_in_good_order_removes_its_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dpgen")
    note = open_note(tmp_path, 1, 0)
    note.close()
    assert not list(tmp_path.iterdir())
    note.close()
    RowNote().close()
    assert not caplog.messages, "a note that another rank has removed is not worth a line"


def test_a_note_that_cannot_be_removed_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dpgen")
    path = tmp_path / open_note(tmp_path, 1, 0).name
    path.unlink()
    path.mkdir()
    assert read_deaths(tmp_path, [], has_no_result) == [], "it can't be read either"
    assert caplog.messages == [f"{path} can't be removed: Is a directory"]


def test_other_files_are_no_notes(tmp_path: Path) -> None:
    names = [".note-attempt-1-rank-00000", ".note-attempt-0001-rank-0", "x.note-attempt-0001-rank-00000"]
    names += [".note-attempt-0001-rank-00000.bak"]
    for name in names:
        (tmp_path / name).write_bytes(b"\1" * 24)
    assert read_deaths(tmp_path, [], has_no_result) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names), "none is removed"
    assert [decode_overdue(name, 30, 60.0) for name in names] == [None] * 4


def test_the_time_of_one_row_counts_for_no_other(tmp_path: Path) -> None:
    note = open_note(tmp_path, 1, 0)
    note.run(RENDERING, 4, lambda note: note.record_time(note.read(), 9.9), note)

    def read_meanwhile(has_time: bool) -> list[RowDeath]:
        if has_time:
            note.record_time(note.read(), 3.9)
        return read_deaths(tmp_path, [], has_no_result)

    assert note.run(RENDERING, 5, read_meanwhile, False) == [RowDeath(1, 0, 5, RENDERING, elapsed_s=0)]
    assert note.run(RENDERING, 5, read_meanwhile, True) == [RowDeath(1, 0, 5, RENDERING, elapsed_s=3)]
    assert note.run(DECODING, 5, read_meanwhile, False) == [RowDeath(1, 0, 5, DECODING, elapsed_s=0)]


@pytest.mark.parametrize("word", [-1, -3, 0, 4 * 5])
def test_a_note_without_a_row_or_a_stage_blames_no_row(tmp_path: Path, word: int) -> None:
    path = tmp_path / open_note(tmp_path, 1, 0).name
    path.write_bytes(struct.pack("3q", word, word, 10**6))
    assert read_deaths(tmp_path, [], has_no_result) == []
    assert not path.exists()


def test_notes_of_rows_with_a_result_are_removed_so_that_a_retry_begins_without_deaths(tmp_path: Path) -> None:
    die_on(tmp_path, 1, 0, row=5)
    die_on(tmp_path, 1, 1, row=6)
    assert read_deaths(tmp_path, [], lambda row: row == 5) == [RowDeath(1, 1, 6, RENDERING)]
    assert read_deaths(tmp_path, [], has_no_result) == [RowDeath(1, 1, 6, RENDERING)]
    remove_notes(tmp_path)
    assert read_deaths(tmp_path, [], has_no_result) == []


@pytest.mark.parametrize("content", [b"", b"x" * 23, b"\xff" * 24])
def test_a_note_that_is_damaged_blames_no_row(tmp_path: Path, content: bytes) -> None:
    (tmp_path / open_note(tmp_path, 1, 0).name).write_bytes(content)
    assert read_deaths(tmp_path, [], has_no_result) == []


def test_without_a_place_for_the_note_rows_are_rendered_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dpgen")
    note = open_note(tmp_path / "missing", 1, 0)
    [message] = caplog.messages
    assert message.startswith(f"rows that kill their rank can't be found, since {tmp_path / 'missing'} can't map files")
    assert note.run(RENDERING, 5, str, 7) == "7"
    note.close()


def test_without_mapped_files_rows_are_rendered_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, length: int) -> None:
        raise ValueError("this file system has no mappings")

    monkeypatch.setattr(mmap, "mmap", fail)
    num_descriptors = len(os.listdir("/proc/self/fd"))
    assert open_note(tmp_path, 1, 0).run(RENDERING, 5, str, 7) == "7"
    assert len(os.listdir("/proc/self/fd")) == num_descriptors


@pytest.mark.parametrize(
    ("deaths", "error"),
    [
        ([RowDeath(1, 0, 5, RENDERING)], None),
        ([RowDeath(1, 0, 5, RENDERING)] * 2, None),  # as two nodes that share a directory read it
        ([RowDeath(1, 0, 5, ORDERING), RowDeath(1, 1, 5, ORDERING)], None),  # all ranks killed while they order rows
        ([RowDeath(1, 0, 5, RENDERING, 124)], None),
        ([RowDeath(1, 0, 5, RENDERING), RowDeath(1, 1, 5, RENDERING)], "render_crashed"),
        ([RowDeath(1, 0, 5, ORDERING), RowDeath(2, 0, 5, ORDERING)], "render_crashed"),
        ([RowDeath(1, 0, 5, ORDERING), RowDeath(1, 0, 5, RENDERING)], "render_crashed"),
        ([RowDeath(1, 0, 5, RENDERING), RowDeath(2, 0, 5, DECODING)], "render_crashed"),
        ([RowDeath(1, 0, 5, DECODING), RowDeath(2, 0, 5, DECODING)], "decode_failed"),
        ([RowDeath(1, 0, 5, RENDERING, 125)], "render_timeout"),
        ([RowDeath(1, 0, 5, DECODING, 125)], "decode_failed"),
    ],
)
def test_a_row_is_blamed_for_two_deaths_or_for_one_after_it_was_overdue(
    deaths: list[RowDeath], error: str | None
) -> None:
    errors, suspects = judge_rows([*deaths, RowDeath(1, 9, 8, RENDERING)], render_timeout_s=60.0)
    assert {row: error.type for row, error in errors.items()} == ({5: error} if error else {})
    assert suspects == ({8} if error else {5, 8})
