"""The journal: every finished row, appended and synced within a second, in files that one attempt of one rank owns.

A segment is a magic line, then frames: length, CRC-32, row index, flags (14.. see `_HEAD`), payload. Nothing is ever
appended to another attempt's segment. A crash can leave a torn frame at the end of a segment: reading stops there,
and at any frame whose checksum is wrong.
"""

from __future__ import annotations

import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpgen.errors import DpgenError
from dpgen.records import RowResult, encode

MAGIC = b"dpgen journal 1\n"
_HEAD = struct.Struct("<IIqB")  # payload length, CRC-32 of (row, flags, payload), row index, flags
_CHECKED = struct.Struct("<qB")
_FLAG_ERROR = 1
_SYNC_INTERVAL_S = 0.5
_BUFFER_BYTES = 1 << 20
_NAME = re.compile(r"attempt-(\d{4,})-rank-(\d{5,})\.journal")


class Journal:
    """Appends this attempt's results; `tick` keeps them at most a second from the disk.

    Raises:
        DpgenError: from any method, once something could not be written: the run must stop, and can be resumed.
    """

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        self.path = folder / f"attempt-{attempt:04d}-rank-{rank:05d}.journal"
        self.num_rows = 0
        self.num_bytes = 0
        self._buffer = bytearray(MAGIC)
        self._syncer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal-sync")
        self._syncing: Future[None] | None = None
        self._unsynced_since_s: float | None = None
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            sync_folder(folder)
        except OSError as error:
            raise self._broken(error) from None

    def append(self, result: RowResult) -> None:
        """Takes a result; it is safe from a crash once `tick` or `close` has synced it."""
        payload = encode(result)
        flags = _FLAG_ERROR if result.error is not None else 0
        checksum = zlib.crc32(payload, zlib.crc32(_CHECKED.pack(result.row, flags)))
        self._buffer += _HEAD.pack(len(payload), checksum, result.row, flags)
        self._buffer += payload
        self.num_rows += 1
        if self._unsynced_since_s is None:
            self._unsynced_since_s = time.monotonic()
        if len(self._buffer) >= _BUFFER_BYTES:
            self._write()

    def tick(self) -> None:
        """Writes and syncs what is older than half a second; the sync itself runs beside the caller."""
        if self._syncing is not None and self._syncing.done():
            self._finish_sync()
        if self._unsynced_since_s is None or self._syncing is not None:
            return
        if time.monotonic() - self._unsynced_since_s >= _SYNC_INTERVAL_S:
            self._write()
            self._unsynced_since_s = None
            self._syncing = self._syncer.submit(os.fdatasync, self._fd)

    def close(self) -> None:
        """Writes and syncs everything; safe to call twice."""
        if self._fd < 0:
            return
        try:
            if self._syncing is not None:
                self._finish_sync()
            self._write()
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                raise self._broken(error) from None
        finally:
            os.close(self._fd)
            self._fd = -1
            self._syncer.shutdown()

    def _finish_sync(self) -> None:
        assert self._syncing is not None
        try:
            self._syncing.result()
        except OSError as error:
            raise self._broken(error) from None
        self._syncing = None

    def _write(self) -> None:
        view = memoryview(bytes(self._buffer))
        self._buffer.clear()
        try:
            while view:
                written = os.write(self._fd, view)
                self.num_bytes += written
                view = view[written:]
        except OSError as error:
            raise self._broken(error) from None

    def _broken(self, error: OSError) -> DpgenError:
        return DpgenError(
            f"the journal {self.path} can't be written: {error.strerror}; nothing that was synced is lost: "
            "make room or mend the disk, then run the same command again"
        )


@dataclass(frozen=True)
class Index:
    """Where each finished row stands: arrays of one length, sorted by row, one entry a row.

    Attributes:
        files: the segments, in the order that `file` counts them.
        row, offset, length: int64: row index, and where its payload starts and how long it is.
        file: int32. error: bool: whether the row's result is an error.
    """

    files: tuple[Path, ...]
    row: np.ndarray
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    error: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


def scan(folder: Path) -> Index:
    """Reads all segments of a journal folder.

    A row that stands in the journal twice (a second attempt at it) counts once: a completion before an error, then
    the earlier attempt, the lower rank, the earlier place.
    """
    files = tuple(sorted(segments(folder), key=_attempt_and_rank))
    parts: list[tuple[int, int, int, int, bool]] = []
    for number, path in enumerate(files):
        parts += [(row, number, offset, length, error) for row, offset, length, error in _frames(path)]
    table = np.array(parts, dtype=np.int64).reshape(-1, 5)
    # lexsort's last key is its first: by row, then completions first, then the order of reading.
    table = table[np.lexsort((np.arange(len(table)), table[:, 4], table[:, 0]))]
    keep = np.ones(len(table), dtype=bool)
    keep[1:] = table[1:, 0] != table[:-1, 0]
    row, file, offset, length, error = table[keep].T
    return Index(files, row, file.astype(np.int32), offset, length, error.astype(bool))


def segments(folder: Path) -> list[Path]:
    """The segments in a journal folder; none if it isn't there."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]


def last_attempt(folder: Path) -> int:
    """The highest attempt that wrote here; 0 if none did."""
    return max((_attempt_and_rank(path)[0] for path in segments(folder)), default=0)


def _attempt_and_rank(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2])


def _frames(path: Path) -> Iterator[tuple[int, int, int, bool]]:
    """(row, payload offset, payload length, is an error) of each sound frame, up to the first that isn't."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(MAGIC)) != MAGIC:
            return
        offset = len(MAGIC)
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, checksum, row, flags = _HEAD.unpack(head)
            offset += _HEAD.size
            if length > size - offset:
                return
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload, zlib.crc32(_CHECKED.pack(row, flags))) != checksum:
                return
            yield row, offset, length, bool(flags & _FLAG_ERROR)
            offset += length


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder (files made or renamed there) outlast a crash."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
