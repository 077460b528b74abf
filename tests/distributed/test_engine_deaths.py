"""Notes of how engines ended, over ranks and nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.rank_threads import ThreadGroup, run_ranks

from dpgen.distributed.engine_deaths import gather_engine_notes, note_engine
from dpgen.distributed.group import InMemoryStore, SingleRankGroup
from dpgen.distributed.layout import Layout
from dpgen.errors import EngineError
from dpgen.journal.engine_notes import BlameState, EngineDeath, EngineNote, read_engine_notes, write_engine_note


def write_notes(journal_dir: Path, *attempts_and_ranks: tuple[int, int]) -> None:
    journal_dir.mkdir(exist_ok=True)
    for attempt, rank in attempts_and_ranks:
        write_engine_note(journal_dir, EngineNote(attempt, rank, 0, 4, 1, None, BlameState()))


@pytest.mark.parametrize(
    ("folders", "places"),
    [
        pytest.param(["a", "a", "a", "a"], {"a": [(2, 0), (2, 1), (2, 2), (2, 3)]}, id="one shared folder"),
        pytest.param(["a", "a", "b", "b"], {"a": [(2, 0), (2, 1)], "b": [(2, 2), (2, 3)]}, id="a folder on each node"),
        pytest.param(["b", "b", "a", "a"], {"a": [(2, 0), (2, 1)], "b": [(2, 2), (2, 3)]}, id="nodes have changed"),
    ],
)
def test_rank_0_reads_each_note_once_from_every_node(
    tmp_path: Path, folders: list[str], places: dict[str, list[tuple[int, int]]]
) -> None:
    for folder, keys in places.items():
        write_notes(tmp_path / folder, *keys)

    def gather(group: ThreadGroup) -> list[tuple[int, int]]:
        notes = gather_engine_notes(group, tmp_path / folders[group.rank])
        return [(note.attempt, note.rank) for note in notes]

    assert run_ranks(gather, ["x", "x", "y", "y"]) == [[(2, 0), (2, 1), (2, 2), (2, 3)], [], [], []]


def test_an_attempt_without_rank_0s_note_does_not_count(tmp_path: Path) -> None:
    write_notes(tmp_path, (2, 0), (3, 1), (2, 2))
    notes = gather_engine_notes(SingleRankGroup(), tmp_path)
    assert [(note.attempt, note.rank) for note in notes] == [(2, 0), (2, 2)]


def test_notes_tell_which_ranks_form_the_engine_and_which_rank_ended_first(tmp_path: Path) -> None:
    error = EngineError("the engine failed: boom")

    def note(group: ThreadGroup) -> None:
        if group.rank == 2:
            note_engine(group, Layout(2, group_size=2), tmp_path, 7, error, BlameState([1]))
        group.all_gather_object(None)
        if group.rank != 2:
            note_engine(group, Layout(2, group_size=2), tmp_path, 7, None, BlameState())

    run_ranks(note, ["x"] * 4)
    notes = read_engine_notes(tmp_path)
    assert [(note.rank, note.first_rank, note.num_ranks) for note in notes] == [
        (0, 0, 2),
        (1, 0, 2),
        (2, 2, 2),
        (3, 2, 2),
    ]
    assert [note.turn for note in notes].index(1) == 2 and sorted(note.turn for note in notes) == [1, 2, 3, 4]
    assert notes[2].death == EngineDeath("the engine failed: boom", False, False) and notes[2].blame.in_flight == [1]


def test_all_ranks_form_one_engine_in_lockstep_and_a_lost_store_makes_nobody_the_first(tmp_path: Path) -> None:
    class LostStore(InMemoryStore):
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Connection reset by peer")

    group = SingleRankGroup()
    group.rank, group.size, group.store = 3, 4, LostStore()
    note_engine(group, Layout(4, lockstep=True), tmp_path, 1, None, BlameState())
    [note] = read_engine_notes(tmp_path)
    assert (note.first_rank, note.num_ranks, note.turn) == (0, 4, 4)
