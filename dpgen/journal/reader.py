"""Reading journals back: which rows they hold, where, and whether every byte is still what was written.

`index_journal` believes the index of a sealed segment, and reads payloads only where there is none; a payload is checked
when it is read (`Reader`). Of a segment that can't be read to its end, what is sound before the damage counts.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpgen.errors import DpgenError
from dpgen.formatting import format_count
from dpgen.journal import format as fmt
from dpgen.journal.format import Frames
from dpgen.records import RowResult, decode_result

_MAX_OPEN_FILES = 64


class DamagedRecord(DpgenError):
    """A record whose checksum is wrong: it was written and synced, and the disk gives back something else.

    Attributes:
        path, row: its segment, and the row it was to hold.
    """

    def __init__(self, path: Path, row: int) -> None:
        super().__init__(
            f"the journal {path} is damaged: the checksum of row {row}'s record is wrong; "
            "'dpgen verify' names all that is damaged"
        )
        self.path, self.row = path, row


@dataclass(frozen=True)
class JournalIndex:
    """Where each finished row stands: arrays of one length, sorted by row, one entry a row. 25 bytes a row.

    Attributes:
        files: the segments, in the order that `file` counts them.
        row, offset: int64: row index, and where its payload starts. length: uint32, of the payload.
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


@dataclass(frozen=True)
class SegmentContents:
    """One segment, as it was found.

    Attributes:
        frames: its sound frames.
        is_sealed: whether it was closed in order, so that every byte of it is meant to be there.
        torn_bytes: at its end, what a crash cut short; harmless, since it was never synced.
        damage: what is wrong with it beyond that; None if nothing is, or if nobody looked (`check`).
    """

    path: Path
    frames: Frames
    is_sealed: bool = False
    torn_bytes: int = 0
    damage: str | None = None


def index_journal(folder: Path) -> JournalIndex:
    """Reads which rows a journal folder holds.

    A row that stands in the journal twice (a second attempt at it) counts once: a completion before an error, then
    the earlier attempt, the lower rank, the earlier place.

    Raises:
        DpgenError: a segment can't be read.
    """
    files = list_segments(folder)
    return _merge(files, [read_segment(path).frames for path in files])


def list_segments(folder: Path) -> list[Path]:
    """The segments in a journal folder, by attempt, rank and part; none if it isn't there."""
    if not folder.is_dir():
        return []
    named = ((fmt.parse_name(path.name), path) for path in folder.iterdir())
    return [path for key, path in sorted((key, path) for key, path in named if key is not None)]


def last_attempt(folder: Path) -> int:
    """The highest attempt that wrote here; 0 if none did."""
    return max((_key(path)[0] for path in list_segments(folder)), default=0)


def _key(path: Path) -> tuple[int, int, int]:
    key = fmt.parse_name(path.name)
    assert key is not None
    return key


def merge_segments(found: Sequence[SegmentContents]) -> JournalIndex:
    """One index over segments, in any order."""
    ordered = sorted(found, key=lambda each: _key(each.path))
    return _merge([each.path for each in ordered], [each.frames for each in ordered])


def _merge(files: Sequence[Path], frames: list[Frames]) -> JournalIndex:
    """One index over segments in their order; empties `frames` as it goes, to spare memory."""
    count = sum(map(len, frames))
    key, offset = np.empty(count, np.int64), np.empty(count, np.int64)
    length, file, error = np.empty(count, np.uint32), np.empty(count, np.int32), np.empty(count, bool)
    stop = count
    while frames:
        each = frames.pop()
        part = slice(stop - len(each), stop)
        key[part] = each.row * 2 + each.error
        offset[part], length[part], file[part], error[part] = each.offset, each.length, len(frames), each.error
        stop = part.start
    # A stable sort: by row, completions first, then the order of reading.
    order = np.argsort(key, kind="stable")
    key = key[order]
    key >>= 1
    keep = np.ones(count, dtype=bool)
    keep[1:] = key[1:] != key[:-1]
    row, order = key[keep], order[keep]
    del key
    offset = offset[order]
    return JournalIndex(tuple(files), row, file[order], offset, length[order], error[order])


def read_segment(path: Path, *, check: bool = False) -> SegmentContents:
    """The sound frames of a segment.

    Args:
        check: read every payload, also where an index would do, and say what is damaged.

    Raises:
        DpgenError: the file can't be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            indexed = _read_index(fd, size)
            if indexed is not None and not check:
                return SegmentContents(path, indexed, is_sealed=True)
            data = _read_at(fd, 0, size)
        finally:
            os.close(fd)
    except OSError as error:
        raise _make_read_error(path, error) from None
    return _read_sealed(path, data, indexed) if indexed is not None else _read_unsealed(path, data)


def _read_sealed(path: Path, data: bytes, indexed: Frames) -> SegmentContents:
    """A segment whose index is sound: every frame is where it says, or is damaged."""
    walked, _ = fmt.scan_frames(data)
    if len(walked) == len(indexed):
        return SegmentContents(path, indexed, is_sealed=True)
    starts = (indexed.offset - fmt.FRAME_HEADER.size).tolist()
    ends = (indexed.offset + indexed.length).tolist()
    sound = np.array(
        [
            fmt.decode_payload(data[start:end], row) is not None
            for start, end, row in zip(starts, ends, indexed.row.tolist(), strict=True)
        ],
        dtype=bool,
    )
    bad = np.flatnonzero(~sound)
    damage = "its first bytes are damaged"
    if len(bad):
        first = bad[0]
        damage = (
            f"{format_count(len(bad), 'damaged record')}, the first at byte {starts[first]} (row {indexed.row[first]})"
        )
    return SegmentContents(path, indexed.select(sound), is_sealed=True, damage=damage)


def _read_unsealed(path: Path, data: bytes) -> SegmentContents:
    """A segment without an index to believe: its frames up to the first that isn't sound."""
    frames, end = fmt.scan_frames(data)
    rest = len(data) - end
    was_sealed = fmt.index_offset(data[-fmt.TRAILER.size :], len(data)) is not None
    if was_sealed or fmt.has_frame_after(data, end):
        return SegmentContents(path, frames, damage=f"unsound from byte {end} of {len(data)}")
    return SegmentContents(path, frames, torn_bytes=rest)


def _read_index(fd: int, size: int) -> Frames | None:
    start = fmt.index_offset(_read_at(fd, max(0, size - fmt.TRAILER.size), fmt.TRAILER.size), size)
    if start is None:
        return None
    begin = _read_at(fd, 0, fmt.HEADER_BYTES)
    found = _read_at(fd, start, size - fmt.TRAILER.size - start)
    return fmt.read_index(found, start, begin[len(fmt.MAGIC) :])


def _read_at(fd: int, offset: int, length: int) -> bytes:
    """`length` bytes, or fewer where the file ends before."""
    first = os.pread(fd, length, offset)
    if len(first) == length or not first:
        return first
    parts = [first]
    while length := length - len(parts[-1]):
        offset += len(parts[-1])
        parts.append(os.pread(fd, length, offset))
        if not parts[-1]:
            break
    return b"".join(parts)


class JournalReader:
    """Reads the results that an index points to, each checked; a context manager.

    Few files are open at a time, however many segments there are.
    """

    def __init__(self, index: JournalIndex) -> None:
        self._index = index
        self._open: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def result(self, position: int) -> RowResult:
        """The result that entry `position` of the index points to.

        Raises:
            DamagedRecord: its checksum is wrong.
            DpgenError: the segment can't be read.
        """
        index = self._index
        row, number = int(index.row[position]), int(index.file[position])
        start = int(index.offset[position]) - fmt.FRAME_HEADER.size
        try:
            found = _read_at(self._fd(number), start, fmt.FRAME_HEADER.size + int(index.length[position]))
        except OSError as error:
            raise _make_read_error(index.files[number], error) from None
        payload = fmt.decode_payload(found, row) if len(found) >= fmt.FRAME_HEADER.size else None
        if payload is None:
            raise DamagedRecord(index.files[number], row)
        return decode_result(payload)

    def _fd(self, number: int) -> int:
        if number in self._open:
            self._open.move_to_end(number)
        else:
            if len(self._open) >= _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(self._index.files[number], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[number]


def _make_read_error(path: Path, error: OSError) -> DpgenError:
    return DpgenError(
        f"the journal {path} can't be read: {error.strerror}; its rows may be safe still: mend the disk or the "
        "permissions, then run the same command again"
    )
