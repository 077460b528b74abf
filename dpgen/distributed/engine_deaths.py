"""Note how a rank's engine ended, and gather the notes of the last attempt's engines from every node."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from dpgen.distributed.attempt import shares_run_dir
from dpgen.distributed.group import RankGroup
from dpgen.distributed.layout import Layout
from dpgen.errors import EngineError
from dpgen.journal.engine_notes import BlameState, EngineDeath, EngineNote, read_engine_notes, write_engine_note

_ENDED = "dpgen/ended"  # store key: the number of ranks that have ended while rows were generated


def note_engine(
    group: RankGroup, layout: Layout, journal_dir: Path, attempt: int, error: EngineError | None, blame: BlameState
) -> None:
    """Note how this rank's part of an attempt ended. Call it before the engine is ended, which ends the others'.

    Args:
        error: how the engine died; None if the rank ends for another reason.
        blame: what this rank knows about rows.
    """
    try:
        turn = group.store.add(_ENDED, 1)
    except RuntimeError:  # the store ended with rank 0, so this rank is not the first
        turn = group.size
    num_ranks = layout.num_ranks_of_engine(group.size)
    first_rank = group.rank // num_ranks * num_ranks
    death = None if error is None else EngineDeath.from_error(error)
    write_engine_note(journal_dir, EngineNote(attempt, group.rank, first_rank, num_ranks, turn, death, blame))


def gather_engine_notes(group: RankGroup, journal_dir: Path) -> list[EngineNote]:
    """Return on rank 0 the notes of the last attempt of which there is rank 0's, and none on other ranks. Collective.

    Rank 0 reads its own directory, and the first rank of each node one that rank 0 doesn't see.
    """
    is_shared = shares_run_dir(group, journal_dir)
    is_reader = group.rank == 0 or (group.is_node_leader and not is_shared)
    own = [note.to_json() for note in read_engine_notes(journal_dir)] if is_reader else []
    gathered = group.gather_object(own)
    if gathered is None:
        return []
    notes = {(note.attempt, note.rank): note for note in map(EngineNote.from_json, chain.from_iterable(gathered))}
    last_attempt = max((attempt for attempt, rank in notes if rank == 0), default=None)
    return [note for (attempt, _), note in sorted(notes.items()) if attempt == last_attempt]
