"""Notes of how engines ended, from one attempt to the next."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dpgen.journal.engine_notes import (
    BlameState,
    EngineDeath,
    EngineNote,
    read_engine_notes,
    remove_engine_notes,
    write_engine_note,
)
from dpgen.journal.row_notes import remove_notes

STATE = BlameState([1, 2], True, False, 3, [[4], [5, 6]], [(7, "boom")], [(1, 2)], [(2, 1)], [(2, 1)], 1)


def make_note(attempt: int = 1, rank: int = 0, death: EngineDeath | None = None) -> EngineNote:
    return EngineNote(attempt, rank, 0, 2, rank + 1, death, STATE)


def test_a_note_says_the_same_when_it_is_read(tmp_path: Path) -> None:
    notes = [make_note(death=EngineDeath("boom", False, True)), make_note(rank=1)]
    for note in notes:
        write_engine_note(tmp_path, note)
    assert read_engine_notes(tmp_path) == notes


def test_a_rank_keeps_its_last_note_only(tmp_path: Path) -> None:
    for note in (make_note(1), make_note(1, 1), make_note(2), make_note(2)):
        write_engine_note(tmp_path, note)
    assert [(note.attempt, note.rank) for note in read_engine_notes(tmp_path)] == [(1, 1), (2, 0)]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"attempt": 1}', b"\xff"])
def test_a_damaged_note_counts_as_not_written(tmp_path: Path, content: bytes) -> None:
    write_engine_note(tmp_path, make_note())
    [path] = tmp_path.iterdir()
    path.write_bytes(content)
    assert read_engine_notes(tmp_path) == []


@pytest.mark.parametrize("remove", [remove_engine_notes, remove_notes])
def test_notes_are_removed_with_their_rows(tmp_path: Path, remove: object) -> None:
    write_engine_note(tmp_path, make_note())
    assert callable(remove)
    remove(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_note_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_engine_note(tmp_path / "absent", make_note())
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "No such file" in record.message
