"""Note the row that a rank works on where its death leaves the note readable, and judge rows by the dead ranks' notes.

- A note is a file of 24 bytes in the journal directory, mapped into memory: noting a row is one store, no system call.
  The kernel keeps it when the process dies. A rank that ends in good order removes its note.
- So a note that no living rank owns is a death. A row that two processes died on is rejected. One death blames nobody,
  since kills from outside happen; the row is a suspect, to be tried last.
- A row that a rank still worked on when it had taken longer than the limit is rejected after one death.
- All ranks order the same rows side by side, and may be killed together. Their deaths in one attempt count once.

Limits: where the journal directory is no file system that can map files, nothing is noted. A death on a node whose
directory other nodes don't see is known there alone; see `row_watch` for rows that take too long.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from dpgen.records import RowError

logger = logging.getLogger(__name__)

A = TypeVar("A")
T = TypeVar("T")

ORDERING, RENDERING, DECODING = 1, 2, 3
STAGES = {ORDERING: "ordering", RENDERING: "rendering", DECODING: "decoding"}
_MIN_DEATHS = 2  # from which on a row is blamed
_NUM_WORDS = 3  # of 8 bytes: the row now, the row last timed, and its seconds
_NOTE_BYTES = 8 * _NUM_WORDS
_GRACE_S = 5.0
_NAME = re.compile(r"\.note-attempt-(\d{4,})-rank-(\d{5,})")


class RowNote:
    """Hold the row that this rank works on.

    Args:
        path: its file; None to keep the note in this process's memory alone.

    Attributes:
        name: the file's name; no other process of the run has it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self.name = path, "" if path is None else path.name
        self._words = memoryview(bytearray(_NOTE_BYTES)).cast("q")
        if path is None:
            return
        try:
            self._words = _map_new_file(path).cast("q")
        except (OSError, ValueError) as error:  # a mapping that the file system lacks may be either
            logger.info(f"rows that kill their rank can't be found, since {path.parent} can't map files: {error}")

    def run(self, stage: int, row: int, action: Callable[[A], T], argument: A) -> T:
        """Return `action(argument)`; meanwhile the note says that `row` is in this stage. Costs 0.15 us."""
        words = self._words
        try:
            words[0] = row * 4 + stage  # 8 aligned bytes: a kill leaves the old word or the new one
            return action(argument)
        finally:
            words[0] = 0

    def read(self) -> int:
        """Return the word for the row and stage now, for `decode_word`; 0 if there is none."""
        return self._words[0]

    def record_time(self, word: int, elapsed_s: float) -> None:
        """Note how long the row of `word` has been in its stage. It counts for no other row."""
        self._words[1], self._words[2] = word, int(elapsed_s)

    def close(self) -> None:
        """Remove the note: this process ends in good order."""
        if self._path is not None:
            _remove(self._path)


class RowDeath(NamedTuple):
    """Describe a row that a process worked on when it died.

    Attributes:
        elapsed_s: how long it had worked on the row, as far as it was timed.
    """

    attempt: int
    rank: int
    row: int
    stage: int
    elapsed_s: int = 0


def open_note(journal_dir: Path, attempt: int, rank: int) -> RowNote:
    """Return the note of this attempt of a rank."""
    return RowNote(journal_dir / f".note-attempt-{attempt:04d}-rank-{rank:05d}")


def get_overdue_key(name: str) -> str:
    """Return the store key under which the rank that owns a note publishes the word of an overdue row."""
    return f"dpgen/overdue/{name}"


def parse_note_name(name: str) -> tuple[int, int] | None:
    """Return (attempt, rank) of a note's file name; None for any other name."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]))


def decode_word(word: int) -> tuple[int, int]:
    """Return (row, stage) of a note's word, which is not 0."""
    return divmod(word, 4)


def decode_overdue(name: str, word: int, render_timeout_s: float) -> RowDeath | None:
    """Return what a lost rank has published under `get_overdue_key`; None if that is nothing.

    Args:
        word: the value of the key, 0 if the rank had no overdue row.
    """
    key = parse_note_name(name)
    return RowDeath(*key, *decode_word(word), math.ceil(compute_overdue_s(render_timeout_s))) if key and word else None


def read_deaths(journal_dir: Path, alive: Collection[str], has_result: Callable[[int], bool]) -> list[RowDeath]:
    """Return the rows that processes worked on when they died, and remove notes that say nothing.

    Args:
        alive: names of the notes of ranks that run.
        has_result: whether a row has a result, so that it is of no more interest. If the row is to be generated again,
            it begins without a death.
    """
    deaths = []
    for path in sorted(journal_dir.glob(".note-*")):
        key = parse_note_name(path.name)
        if key is None or path.name in alive:
            continue
        word, timed_word, elapsed_s = _read_words(path)
        row, stage = decode_word(word)
        if row < 0 or stage not in STAGES or has_result(row):
            _remove(path)
        else:
            deaths.append(RowDeath(*key, row, stage, elapsed_s if timed_word == word else 0))
    return deaths


def remove_notes(journal_dir: Path) -> None:
    """Remove all notes of a directory, since they are about other rows."""
    for path in journal_dir.glob(".note-*"):
        _remove(path)


def compute_overdue_s(render_timeout_s: float) -> float:
    """Return the seconds from which on a row is beyond its limit, and no alarm has interrupted it.

    See `dpgen.data.time_limit`: code that can be interrupted is interrupted within twice the limit.
    """
    return 2 * render_timeout_s + _GRACE_S


def judge_rows(deaths: Iterable[RowDeath], render_timeout_s: float) -> tuple[dict[int, RowError], set[int]]:
    """Return the rows that are to be rejected, with their errors, and the suspects.

    Args:
        deaths: of all nodes; the same death may come from several nodes that share a directory.
    """
    by_row: dict[int, list[RowDeath]] = defaultdict(list)
    for death in sorted(set(deaths)):
        by_row[death.row].append(death)
    overdue_s = compute_overdue_s(render_timeout_s)
    errors = {row: error for row, dead in by_row.items() if (error := _judge(dead, render_timeout_s, overdue_s))}
    return errors, set(by_row) - set(errors)


def _judge(deaths: list[RowDeath], limit_s: float, overdue_s: float) -> RowError | None:
    is_decoded = all(death.stage == DECODING for death in deaths)
    action = "decoding" if is_decoded else "rendering"
    if any(death.elapsed_s >= overdue_s for death in deaths):
        message = f"{action} took longer than data.render_timeout_s={limit_s:g} and could not be interrupted"
        return RowError("decode_failed" if is_decoded else "render_timeout", message)
    num_deaths = len({(death.attempt, -1 if death.stage == ORDERING else death.rank) for death in deaths})
    if num_deaths < _MIN_DEATHS:
        return None
    message = f"{num_deaths} processes died while they were {action} this row"
    return RowError("decode_failed" if is_decoded else "render_crashed", message)


def _map_new_file(path: Path) -> memoryview:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        # Written rather than truncated to size: storing into a hole of a full disk would end the process.
        os.write(fd, bytes(_NOTE_BYTES))
        return memoryview(mmap.mmap(fd, _NOTE_BYTES))
    finally:
        os.close(fd)  # the mapping keeps a descriptor of its own


def _read_words(path: Path) -> tuple[int, int, int]:
    """Return the words of a note; zeros if it is gone or cut short."""
    try:
        data = path.read_bytes()
    except OSError:
        return 0, 0, 0
    if len(data) != _NOTE_BYTES:
        return 0, 0, 0
    word, timed_word, elapsed_s = memoryview(data).cast("q")
    return word, timed_word, elapsed_s


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.info(f"{path} can't be removed: {error.strerror}")
