"""Note how a rank's engine ended, for the next attempt: where engines share their work, one's death ends all ranks.

- Each rank writes a note when an attempt ends early while rows are generated, whatever ended it. So the next attempt
  knows who ended first, and which rows that engine had.
- A rank that is killed writes none. Then nobody knows whether its engine died with it, and no row is blamed.
- A rank keeps its last note only. All of them are removed once the rows are complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dpgen.errors import DpgenError, EngineError
from dpgen.journal.files import atomic_write_text

logger = logging.getLogger(__name__)

_PREFIX = ".note-engine"
# What gloo says in a process of an engine when another one has ended.
_PEER_GONE = ("connection closed by peer", "connection reset by peer", "broken pipe")


class EngineDeath(NamedTuple):
    """Tell how an engine died; see the properties of `dpgen.errors.EngineError`."""

    first_line: str
    is_external_kill: bool
    is_out_of_memory: bool

    @classmethod
    def from_error(cls, error: EngineError) -> EngineDeath:
        """Return what the error says."""
        return cls(error.first_line, error.is_external_kill, error.is_out_of_memory)

    @property
    def is_of_peer(self) -> bool:
        """Return True if another process of the engine died, and only its end was seen here."""
        return any(words in self.first_line.lower() for words in _PEER_GONE)


@dataclass(frozen=True)
class BlameState:
    """Hold what one rank knows about rows that may kill its engine, as JSON does; see `dpgen.engine.blame`.

    Attributes:
        in_flight: rows that the engine had.
        is_trial: they were a group of suspects.
        is_canary: the engine had the canary instead.
        num_finished: rows that this attempt's engine had finished, the canary included.
        groups: suspects, by the group in which they are tried.
        held: pairs of a row that killed its engine while alone, and how.
        deaths, kills, isolated_kills: pairs of a row and a count.
        num_canary_deaths: deaths on the canary since a row was finished.
    """

    in_flight: list[int] = field(default_factory=list)
    is_trial: bool = False
    is_canary: bool = False
    num_finished: int = 0
    groups: list[list[int]] = field(default_factory=list)
    held: list[tuple[int, str]] = field(default_factory=list)
    deaths: list[tuple[int, int]] = field(default_factory=list)
    kills: list[tuple[int, int]] = field(default_factory=list)
    isolated_kills: list[tuple[int, int]] = field(default_factory=list)
    num_canary_deaths: int = 0

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BlameState:
        """Return the state of which `value` holds the fields, with lists for tuples."""
        pairs = ("held", "deaths", "kills", "isolated_kills")
        return cls(**{**value, **{name: [tuple(pair) for pair in value[name]] for name in pairs}})


@dataclass(frozen=True)
class EngineNote:
    """Tell how one rank's part of an attempt ended.

    Attributes:
        first_rank, num_ranks: the ranks whose processes form the engine.
        turn: 1 for the first rank that ended, and so on.
        death: how this rank's engine died; None if the rank ended for another reason.
    """

    attempt: int
    rank: int
    first_rank: int
    num_ranks: int
    turn: int
    death: EngineDeath | None
    blame: BlameState

    def to_json(self) -> dict[str, Any]:
        """Return the note as JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EngineNote:
        """Return the note that `to_json` returned."""
        death, blame = value["death"], BlameState.from_json(value["blame"])
        return cls(**{**value, "death": None if death is None else EngineDeath(*death), "blame": blame})


def find_cause(notes: Sequence[EngineNote]) -> EngineDeath | None:
    """Return the death that ended the processes of an engine: the first that is not the sight of another's end."""
    deaths = [note.death for note in sorted(notes, key=lambda note: note.turn) if note.death is not None]
    return next((death for death in deaths if not death.is_of_peer), deaths[0] if deaths else None)


def write_engine_note(journal_dir: Path, note: EngineNote) -> None:
    """Write this rank's note, in place of its last one. A note that can't be written costs the blame of one death."""
    earlier = set(journal_dir.glob(f"{_PREFIX}-*-rank-{note.rank:05d}.json"))
    path = journal_dir / f"{_PREFIX}-attempt-{note.attempt:04d}-rank-{note.rank:05d}.json"
    try:
        atomic_write_text(path, json.dumps(note.to_json()))
    except DpgenError as error:
        logger.warning(f"the next attempt won't know which rows this rank's engine had: {error}")
        return
    _remove(earlier - {path})


def read_engine_notes(journal_dir: Path) -> list[EngineNote]:
    """Return the notes of a directory; one that is damaged counts as not written."""
    notes = []
    for path in sorted(journal_dir.glob(f"{_PREFIX}-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            notes.append(EngineNote.from_json(json.loads(path.read_bytes())))
    return notes


def remove_engine_notes(journal_dir: Path) -> None:
    """Remove all notes of a directory: the rows are complete."""
    _remove(set(journal_dir.glob(f"{_PREFIX}-*.json")))


def _remove(paths: set[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # it is older than the notes that count
            path.unlink(missing_ok=True)
