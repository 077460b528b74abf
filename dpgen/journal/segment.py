"""One segment of a journal: written group by group, sealed with its index, and mended where the disk has damaged it."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from dpgen.errors import EXIT_RESUMABLE, DpgenError
from dpgen.journal import format as fmt
from dpgen.journal.files import FileSystem
from dpgen.journal.reader import read_segment


class WriteBatch:
    """Frames that are written and synced together."""

    __slots__ = ("data", "first_append_s", "flags", "lengths", "rows")

    def __init__(self) -> None:
        self.data = bytearray()
        self.rows, self.lengths, self.flags = array("q"), array("I"), bytearray()
        self.first_append_s = 0.0

    def add(self, row: int, flags: int, payload: bytes) -> None:
        if not self.rows:
            self.first_append_s = time.monotonic()
        self.data += fmt.encode_frame(row, flags, payload)
        self.rows.append(row)
        self.lengths.append(len(payload))
        self.flags.append(flags)


class SegmentWriter:
    """One segment being written. Every method raises OSError, after which only `abandon` may follow."""

    def __init__(self, path: Path, files: FileSystem, wrote: Callable[[int], None]) -> None:
        self._path, self._files, self._wrote = path, files, wrote
        self._id = os.urandom(fmt.ID_BYTES)
        self._index = WriteBatch()  # its data stays empty
        self.num_bytes = 0
        self._fd = files.create(path)
        try:
            files.sync_folder(path.parent)  # or a crash could take the name, and with it all that was synced
        except OSError:
            self.abandon()
            raise

    def write(self, group: WriteBatch) -> None:
        """Writes and syncs a group."""
        self._write(fmt.encode_segment_header(self._id) + group.data if not self.num_bytes else group.data)
        self._files.sync(self._fd)
        self._index.rows += group.rows
        self._index.lengths += group.lengths
        self._index.flags += group.flags

    def seal(self) -> None:
        """Ends the segment with its index, if it has any rows, and closes it."""
        index = self._index
        if index.rows:
            self._write(fmt.encode_index(self._id, index.rows, index.lengths, index.flags, self.num_bytes))
            self._files.sync(self._fd)
        fd, self._fd = self._fd, -1
        self._files.close(fd)

    def abandon(self) -> None:
        """Closes the file as it is."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                self._files.close(fd)
            except OSError:
                return  # nothing counts on what was not synced

    def _write(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            written = self._files.write(self._fd, view)
            if written <= 0:
                raise OSError(f"the system wrote {written} of {len(view)} bytes")
            self.num_bytes += written
            self._wrote(written)
            view = view[written:]


class RowsLost(DpgenError):
    """A segment was damaged; it is mended, and some of its rows are to be generated again."""

    exit_status = EXIT_RESUMABLE

    def __init__(self, path: Path, rows: list[int]) -> None:
        super().__init__(
            f"the journal {path} was damaged after it was written: the disk gave back something else. Rows lost with "
            f"that: {len(rows)}{f' (the first is row {rows[0]})' if rows else ''}. They count as missing now: run the "
            "same command again to generate them"
        )


def repair_segment(path: Path, files: FileSystem | None = None) -> list[int]:
    """Replaces a sealed segment that is damaged by one with its sound records; the old one stays as ``NAME.damaged``.

    The rows lost with the others then count as missing, so that the next attempt generates them.

    Returns:
        the rows whose records were damaged, in ascending order: none if the segment is sound, or was never sealed
        (reading that one stops at the damage of itself).

    Raises:
        DpgenError: it can't be read, or its replacement can't be written.
    """
    files = files or FileSystem()
    found = read_segment(path, check=True)
    indexed = read_segment(path)
    if found.damage is None or not indexed.is_sealed:
        return []
    temporary = path.with_name(f".{path.name}.mended")
    old = path.with_name(f"{path.name}.damaged")
    try:
        temporary.unlink(missing_ok=True)  # of an earlier try
        group = WriteBatch()
        with path.open("rb") as file:
            for row, offset, length, error in zip(
                found.frames.row, found.frames.offset, found.frames.length, found.frames.error, strict=True
            ):
                file.seek(offset)
                group.add(int(row), int(error), file.read(length))
        mended = SegmentWriter(temporary, files, lambda num_bytes: None)
        mended.write(group)
        mended.seal()
        if not old.exists():
            files.link(path, old)
        files.replace(temporary, path)
        files.sync_folder(path.parent)
    except OSError as error:
        raise DpgenError(format_write_error(path, error)) from None
    return sorted(set(indexed.frames.row.tolist()) - set(found.frames.row.tolist()))


def format_write_error(path: Path, cause: OSError | str) -> str:
    """The message for whoever must mend the disk."""
    reason = cause if isinstance(cause, str) else cause.strerror or str(cause)
    return (
        f"the journal {path} can't be written: {reason}; nothing that was synced is lost: "
        "make room or mend the disk, then run the same command again"
    )
