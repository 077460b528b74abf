"""Send journal segments to rank 0 by `gather_object`, in rounds that fit in rank 0's memory.

- Segments travel as files, byte for byte, so that rank 0 reads gathered rows like any other journal.
- Where fewer than half of the ranks have something to send, these alone take part in a round, with larger chunks.
- A received segment gets its name only once all of it is on rank 0's disk.
- The id in its header tells which segment it is. One that rank 0 has already is not kept twice. One whose name belongs
  to another segment gets a free name: no segment is overwritten, and none is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpgen.distributed.group import RankGroup
from dpgen.errors import DpgenError
from dpgen.journal import format as fmt
from dpgen.journal.files import FileSystem
from dpgen.journal.reader import list_segments, make_read_error
from dpgen.journal.segment import RowsLost, format_write_error, repair_segment

_Chunk = Sequence[Any]  # segment name, offset, bytes; `gather_object` makes the tuple a list


def gather_segments(group: RankGroup, journal_dir: Path, segments: list[Path], gather_bytes: int) -> int:
    """Copy journal segments from ranks that don't share rank 0's run directory to rank 0. Collective.

    Args:
        journal_dir: this rank's journal directory; rank 0's is the target.
        segments: this rank's segments to send; none if rank 0 has them already.
        gather_bytes: bytes that rank 0 receives in one round at most, over all ranks. Where most ranks send, these are
            divided by all ranks, since `gather_object` pads every rank's object to the largest one.

    Returns:
        the number of rounds; 0 if no rank had anything to send.

    Raises:
        DpgenError: rank 0 can't write, or a segment can't be read.
        RowsLost: a segment is damaged.
    """
    group.run_on_all_ranks(lambda: _remove_unpublished(journal_dir) if group.rank == 0 else None)
    chunks = group.run_on_all_ranks(lambda: _ChunkReader(segments))
    num_rounds = 0
    while senders := [rank for rank, sends in enumerate(group.all_gather_object(not chunks.is_finished)) if sends]:
        num_rounds += 1
        few = senders if 2 * len(senders) < group.size else None
        max_bytes = max(1, gather_bytes // len(few or group.nodes))
        chunk = group.run_on_all_ranks(partial(chunks.read_next, max_bytes))
        received = group.gather_object(chunk, few)
        group.run_on_all_ranks(partial(_write_received, journal_dir, received))
    if num_rounds:
        group.run_on_all_ranks(lambda: _publish_received(journal_dir) if group.rank == 0 else None)
    return num_rounds


class _ChunkReader:
    """Read the content of segments in chunks, one segment after the other.

    Raises:
        DpgenError: a segment can't be read.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._paths, self._offset = [path for path in reversed(paths) if _read_size(path)], 0

    @property
    def is_finished(self) -> bool:
        """Return True once all has been read."""
        return not self._paths

    def read_next(self, max_bytes: int) -> _Chunk | None:
        """Return the next chunk, of at most `max_bytes`; None once all has been read.

        Raises:
            RowsLost: a segment is damaged. This rank repairs the segment, and its lost rows count as missing from now
                on. Rank 0 could repair only its own copy, and this node would send the damaged segment again and again.
        """
        if not self._paths:
            return None
        path, offset = self._paths[-1], self._offset
        if offset == 0 and (lost_rows := repair_segment(path)):
            raise RowsLost(path, lost_rows)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(max_bytes)
        except OSError as error:
            raise make_read_error(path, error) from None
        self._offset += len(data)
        if not data or self._offset >= _read_size(path):
            self._paths.pop()
            self._offset = 0
        return path.name, offset, data


def _read_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise make_read_error(path, error) from None


def _write_received(journal_dir: Path, received: list[_Chunk | None] | None) -> None:
    for sender, chunk in enumerate(received or ()):
        if chunk is None:
            continue
        name, offset, data = chunk
        part = journal_dir / f".{name}.from-{sender}.part"  # two ranks may send different segments of one name
        try:
            with part.open("wb" if offset == 0 else "r+b") as file:
                file.seek(offset)
                file.write(data)
        except OSError as error:
            raise DpgenError(format_write_error(part, error)) from None


def _remove_unpublished(journal_dir: Path) -> None:
    """Remove what a gather that was interrupted has left: its senders still have all of it."""
    try:
        for part in journal_dir.glob(".*.part"):
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DpgenError(format_write_error(journal_dir, error)) from None


def _publish_received(journal_dir: Path) -> None:
    """Give each received file a segment name, unless that segment is there and at least as long."""
    files = FileSystem()
    try:
        for part in sorted(journal_dir.glob(".*.part")):
            files.sync_path(part)
            name = part.name[1:].removesuffix(".part").rpartition(".from-")[0]
            final = _find_place(journal_dir, name, _read_id(part))
            if final.exists() and final.stat().st_size >= part.stat().st_size:
                part.unlink()
            else:
                files.replace(part, final)
        files.sync_directory(journal_dir)
    except OSError as error:
        raise DpgenError(format_write_error(journal_dir, error)) from None


def _find_place(journal_dir: Path, name: str, segment_id: bytes | None) -> Path:
    """Return where the segment `segment_id` is, or else a free name for it: `name` if possible."""
    key = fmt.parse_name(name)
    assert key is not None
    attempt, _, part = key
    named = {path: fmt.parse_name(path.name) or key for path in list_segments(journal_dir)}
    taken = [
        path
        for path, (other_attempt, rank, other_part) in named.items()
        if (other_attempt, other_part) == (attempt, part) and (path.name == name or rank >= fmt.FIRST_FOREIGN_RANK)
    ]
    for path in taken:
        if _read_id(path) == segment_id:
            return path
    place, rank = journal_dir / name, fmt.FIRST_FOREIGN_RANK
    while place in taken:
        place, rank = journal_dir / fmt.segment_name(attempt, rank, part), rank + 1
    return place


def _read_id(path: Path) -> bytes | None:
    with path.open("rb") as file:
        return fmt.decode_segment_id(file.read(fmt.HEADER_BYTES))
