"""Write one segment of a journal batch by batch, seal it with its index, and repair it if the disk damaged it."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from array import array
from collections.abc import Callable
from pathlib import Path

from dpgen.errors import EXIT_RESUMABLE, DpgenError
from dpgen.journal import format as fmt
from dpgen.journal.files import FileSystem
from dpgen.journal.format import Frames
from dpgen.journal.reader import read_segment


class WriteBatch:
    """Collect frames that are written and synced together.

    Attributes:
        data: the encoded frames.
        rows, lengths, flags: of each frame, its row index, payload bytes and flags.
        first_append_s: monotonic time of the first frame.
    """

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
    """Write one segment. Every method raises OSError; afterwards only `abandon` may be called.

    Args:
        on_write: called with the number of bytes after each write.
    """

    def __init__(self, path: Path, files: FileSystem, on_write: Callable[[int], None]) -> None:
        self._path, self._files, self._on_write = path, files, on_write
        self._id = os.urandom(fmt.ID_BYTES)
        self._index = WriteBatch()  # collects rows, lengths and flags; its data stays empty
        self.num_bytes = 0
        self._fd = files.create(path)
        try:
            # Without this sync a crash could remove the file's name, and with it every row that was synced.
            files.sync_directory(path.parent)
        except OSError:
            self.abandon()
            raise

    def write(self, batch: WriteBatch) -> None:
        """Write and sync a batch."""
        self._write(fmt.encode_segment_header(self._id) + batch.data if not self.num_bytes else batch.data)
        self._files.sync(self._fd)
        self._index.rows += batch.rows
        self._index.lengths += batch.lengths
        self._index.flags += batch.flags

    def seal(self, *, keeps_empty: bool = False) -> bool:
        """Write and sync the index, and close the file.

        Args:
            keeps_empty: keep the file if it has no rows. Each of a thousand ranks would leave one at each attempt.

        Returns:
            True if the file is still there.
        """
        index, is_kept = self._index, keeps_empty or bool(self._index.rows)
        if is_kept:
            self._write(fmt.encode_index(self._id, index.rows, index.lengths, index.flags, self.num_bytes))
            self._files.sync(self._fd)
        fd, self._fd = self._fd, -1
        self._files.close(fd)
        if is_kept:
            return True
        try:
            self._files.remove(self._path)
        except OSError:  # an empty segment is no harm
            return True
        return False

    def abandon(self) -> None:
        """Close the file as it is."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                self._files.close(fd)
            except OSError:
                return  # unsynced rows count nowhere, so nothing is lost

    def _write(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            num_written = self._files.write(self._fd, view)
            if num_written <= 0:
                raise OSError(f"the system wrote {num_written} of {len(view)} bytes")
            self.num_bytes += num_written
            self._on_write(num_written)
            view = view[num_written:]


class RowsLost(DpgenError):
    """Report a damaged segment that was repaired; its lost rows must be generated again."""

    exit_status = EXIT_RESUMABLE

    def __init__(self, path: Path, rows: list[int]) -> None:
        super().__init__(
            f"the journal {path} was damaged on disk after it was written. "
            f"Rows lost: {len(rows):,}{f' (first: row {rows[0]})' if rows else ''}. "
            "They count as missing now: rerun the same command to generate them again"
        )


def repair_segment(path: Path, files: FileSystem | None = None) -> list[int]:
    """Replace a damaged sealed segment by one with its sound records; the damaged file stays as ``NAME.damaged``.

    The lost rows then count as missing, so that the next attempt generates them.

    Returns:
        the rows with damaged records, ascending. Empty if the segment is sound or was never sealed: of an unsealed
        segment only the rows before the damage count anyway.

    Raises:
        DpgenError: the segment can't be read, or its replacement can't be written.
    """
    files = files or FileSystem()
    checked = read_segment(path, check=True)
    indexed = read_segment(path)
    if checked.damage is None or not indexed.is_sealed:
        return []
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.mended")
    damaged = path.with_name(f"{path.name}.damaged")
    try:
        batch = _read_batch(path, checked.frames)
        replacement = SegmentWriter(temporary, files, lambda num_bytes: None)
        replacement.write(batch)
        replacement.seal(keeps_empty=True)
        if not damaged.exists():
            files.link(path, damaged)
        files.replace(temporary, path)
        files.sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DpgenError(format_write_error(path, error)) from None
    return sorted(set(indexed.frames.results.row.tolist()) - set(checked.frames.results.row.tolist()))


def format_write_error(path: Path, cause: OSError | str) -> str:
    """Return the message for a journal file that can't be written."""
    reason = cause if isinstance(cause, str) else cause.strerror or str(cause)
    return (
        f"the journal {path} can't be written: {reason}. No synced row is lost: "
        "free space or fix the disk, then rerun the same command to resume"
    )


def _read_batch(path: Path, frames: Frames) -> WriteBatch:
    """Read frames of a segment into one batch."""
    batch = WriteBatch()
    with path.open("rb") as file:
        flags = frames.error * fmt.FLAG_ERROR + frames.attempt * fmt.FLAG_ATTEMPT
        for row, offset, length, flag in zip(frames.row, frames.offset, frames.length, flags, strict=True):
            file.seek(offset)
            batch.add(int(row), int(flag), file.read(length))
    return batch
