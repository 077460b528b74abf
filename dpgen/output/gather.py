"""Bringing rows to rank 0: journal segments travel by `gather_object`, in rounds that rank 0's memory can hold.

What arrives is the journal itself, file by file: whatever reads a journal then needs no second way to read rows.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dpgen.distributed.group import RankGroup
from dpgen.errors import DpgenError
from dpgen.journal.files import FileSystem
from dpgen.journal.segment import RowsLost, format_write_error, repair_segment


def gather_segments(group: RankGroup, journal: Path, segments: list[Path], gather_bytes: int) -> int:
    """Copies journal segments from ranks whose run folder rank 0 doesn't see into rank 0's.

    Args:
        journal: the journal folder, on rank 0 the one to copy into.
        sending: this rank's segments to send; none where rank 0 sees them.
        gather_bytes: the most bytes of rows that rank 0 takes in one round, over all ranks. `gather_object` pads
            every rank's object to the largest, so each rank's share is a `size`-th of that.

    Returns:
        how many rounds it took: 0 where nothing had to be sent.

    Raises:
        DpgenError: rank 0's disk refuses, or a segment can't be read.
    """
    chunks = _chunks(segments, max(1, gather_bytes // group.size))
    rounds = 0
    while True:
        chunk = group.run_on_all_ranks(lambda: next(chunks, None))
        if not any(group.all_gather_object(chunk is not None)):
            break
        rounds += 1
        received = group.gather_object(chunk)
        group.run_on_all_ranks(partial(_write_received, journal, received))
    if rounds:
        group.run_on_all_ranks(lambda: _publish_received(journal) if group.rank == 0 else None)
    return rounds


def shares_run_dir(group: RankGroup, folder: Path) -> bool:
    """Whether this rank's run folder is rank 0's: rank 0 leaves a file of a random name there, and the others look.

    Collective. The file is gone when this returns.
    """
    name: str = group.all_gather_object(f".rank-0-{uuid.uuid4().hex}" if group.rank == 0 else None)[0]
    mark: Path = folder / name
    if group.rank == 0:
        mark.touch()
    group.all_gather_object(None)  # nobody looks before it is there
    seen = mark.exists()
    group.all_gather_object(None)  # nor is it removed before all have looked
    if group.rank == 0:
        mark.unlink()
    return seen


def _write_received(journal: Path, received: list[tuple[str, int, bytes] | None] | None) -> None:
    for each in received or ():
        if each is not None:
            name, offset, data = each
            part = journal / f".{name}.part"
            try:
                with part.open("wb" if offset == 0 else "r+b") as file:
                    file.seek(offset)
                    file.write(data)
            except OSError as error:
                raise DpgenError(format_write_error(part, error)) from None


def _chunks(paths: list[Path], size: int) -> Iterator[tuple[str, int, bytes]]:
    """(segment name, offset, bytes) of all paths, at most `size` bytes at a time.

    Raises:
        RowsLost: a segment is damaged. It is mended here, where its rows count as missing from now on; rank 0 could
            mend its copy only, and this node would send the damaged one again and again.
    """
    for path in paths:
        if lost := repair_segment(path):
            raise RowsLost(path, lost)
        with path.open("rb") as file:
            offset = 0
            while data := file.read(size):
                yield path.name, offset, data
                offset += len(data)


def _publish_received(journal: Path) -> None:
    """Gives what was received its real name, unless that is there already and is as long."""
    files = FileSystem()
    try:
        for part in journal.glob(".*.part"):
            files.sync_path(part)
            final = journal / part.name[1 : -len(".part")]
            if final.exists() and final.stat().st_size >= part.stat().st_size:
                part.unlink()
            else:
                files.replace(part, final)
        files.sync_folder(journal)
    except OSError as error:
        raise DpgenError(format_write_error(journal, error)) from None
