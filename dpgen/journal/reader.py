"""Read journals: which rows they hold, where each row is, and whether all bytes are still as written.

- `index_journal` trusts the index of a sealed segment. It reads payloads only of segments without an index.
- `JournalReader` checks a payload's checksum when it reads the payload. It reads many results in batches that are
  bounded by rows and by bytes, and opens each file at most once for a batch.
- If a segment is damaged, the sound frames before the damage count.
- Rejected attempts are no results: an index leaves them out, but for `index_attempts`.
- A row with several results counts once: a completion before an error, then the earlier attempt, the lower rank, the
  earlier position.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpgen.errors import DpgenError
from dpgen.formatting import format_count
from dpgen.journal import format as fmt
from dpgen.journal.format import Frames
from dpgen.journal.row_notes import parse_note_name
from dpgen.records import RowResult
from dpgen.result_codec import decode_result

BATCH_ROWS = 2_000
BATCH_BYTES = 64 << 20  # of encoded results; their Python objects take a few times as much
_MIN_OPEN_FILES = 64


class DamagedRecord(DpgenError):
    """Report a record with a wrong checksum: it was written and synced, but the disk returns other bytes.

    Attributes:
        path: the segment.
        row: the row of the record.
    """

    def __init__(self, path: Path, row: int) -> None:
        super().__init__(
            f"the journal {path} is damaged: the record of row {row} has a wrong checksum. "
            "'dpgen verify' lists all damaged records"
        )
        self.path, self.row = path, row


@dataclass(frozen=True)
class JournalIndex:
    """Locate the result of each finished row: arrays of one length, sorted by row, one entry and 25 bytes per row.

    Attributes:
        files: the segments that `file` refers to.
        row: int64[num_done], row indices.
        file: int32[num_done], index into `files`.
        offset: int64[num_done], where in the file the payload starts.
        length: uint32[num_done], bytes of the payload.
        error: bool[num_done], True if the result is an error.
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
    """Describe one segment as read from disk.

    Attributes:
        frames: its sound frames.
        is_sealed: True if its writer closed it in order, so that every byte is meant to be there.
        torn_bytes: bytes at its end that a crash cut short; harmless, since they were never synced.
        damage: what else is wrong; None if nothing is, or if `read_segment` did not check.
    """

    path: Path
    frames: Frames
    is_sealed: bool = False
    torn_bytes: int = 0
    damage: str | None = None


def index_journal(journal_dir: Path, on_segment: Callable[[], None] = lambda: None) -> JournalIndex:
    """Return an index over the rows of a journal directory.

    Args:
        on_segment: called after each segment is read.

    Raises:
        DpgenError: a segment can't be read.
    """
    files, frames = list_segments(journal_dir), []
    for path in files:
        frames.append(read_segment(path).frames.results)
        on_segment()
    return _merge(files, frames)


def index_attempts(
    journal_dir: Path, is_wanted: Callable[[np.ndarray], np.ndarray]
) -> tuple[JournalIndex, dict[int, int]]:
    """Return an index over rejected attempts, in the order of segments and frames; a row may have several.

    Also returns, for each wanted row with a result, the last attempt of the job that gave it one.

    Args:
        is_wanted: rows, int64[n] → which of them are wanted, bool[n].

    Raises:
        DpgenError: a segment can't be read.
    """
    files, parts, last_results = list_segments(journal_dir), [], dict[int, int]()
    for number, path in enumerate(files):
        frames = read_segment(path).frames
        results = frames.results.row
        last_results |= dict.fromkeys(results[is_wanted(results)].tolist(), _get_sort_key(path)[0])
        attempts = frames.attempts
        attempts = attempts.select(is_wanted(attempts.row))
        parts.append((np.full(len(attempts), number, np.int32), attempts))
    all_attempts = [fmt.NO_FRAMES, *(attempts for _, attempts in parts)]
    index = JournalIndex(
        tuple(files),
        np.concatenate([attempts.row for attempts in all_attempts]),
        np.concatenate([np.empty(0, np.int32), *(file for file, _ in parts)]),
        np.concatenate([attempts.offset for attempts in all_attempts]),
        np.concatenate([attempts.length for attempts in all_attempts]),
        np.concatenate([attempts.error for attempts in all_attempts]),
    )
    return index, last_results


def list_segments(journal_dir: Path) -> list[Path]:
    """Return the segments of a journal directory by attempt, rank and part; none if the directory does not exist."""
    if not journal_dir.is_dir():
        return []
    named = ((fmt.parse_name(path.name), path) for path in journal_dir.iterdir())
    return [path for key, path in sorted((key, path) for key, path in named if key is not None)]


def list_attempts(journal_dir: Path) -> list[int]:
    """Return the attempts that have a segment in a journal directory, ascending."""
    return sorted({_get_sort_key(path)[0] for path in list_segments(journal_dir)})


def last_attempt(journal_dir: Path) -> int:
    """Return the highest attempt with a segment, or a note of a dead rank, in the directory; 0 if there is none."""
    names = [path.name for path in journal_dir.iterdir()] if journal_dir.is_dir() else []
    return max((key[0] for name in names if (key := fmt.parse_name(name) or parse_note_name(name))), default=0)


def merge_segments(segments: Sequence[SegmentContents]) -> JournalIndex:
    """Return one index over segments, which may come in any order."""
    ordered = sorted(segments, key=lambda segment: _get_sort_key(segment.path))
    return _merge([segment.path for segment in ordered], [segment.frames.results for segment in ordered])


def index_other_results(segments: Sequence[SegmentContents]) -> JournalIndex:
    """Return an index over the results that `merge_segments` leaves out; a row may have several entries."""
    ordered = sorted(segments, key=lambda segment: _get_sort_key(segment.path))
    frames = [segment.frames.results for segment in ordered]
    return _merge([segment.path for segment in ordered], frames, are_kept=False)


def read_segment(path: Path, *, check: bool = False) -> SegmentContents:
    """Return the sound frames of a segment.

    Args:
        check: read every payload, even if there is an index, and describe the damage.

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
        raise make_read_error(path, error) from None
    return _read_sealed(path, data, indexed) if indexed is not None else _read_unsealed(path, data)


class JournalReader:
    """Read and check the results that an index points to; a context manager.

    At most half as many files are open at a time as the process may open (64 at least), so a run of a thousand ranks
    opens each segment once.

    Attributes:
        index: locates the results.
    """

    def __init__(self, index: JournalIndex) -> None:
        self.index = index
        self._open: OrderedDict[int, int] = OrderedDict()  # index into `files` → descriptor, least recently used first
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_open_files = len(index.files) if limit == resource.RLIM_INFINITY else max(_MIN_OPEN_FILES, limit // 2)

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def iter_batches(self, positions: np.ndarray) -> Iterator[list[RowResult]]:
        """Yield the results that entries of the index point to, in the order given, in batches.

        Rows that follow each other are in the segments of different ranks. So a batch is read segment by segment and
        put back in order: one open() for each file and batch, not for each row.

        Args:
            positions: int64[num_results], entries of the index.

        Raises:
            DamagedRecord: the checksum of a result is wrong.
            DpgenError: a segment can't be read.
        """
        index = self.index
        ends = np.cumsum(index.length[positions], dtype=np.int64)
        start = num_bytes = 0
        while start < len(positions):
            stop = int(np.searchsorted(ends, num_bytes + BATCH_BYTES, side="right"))
            stop = min(max(stop, start + 1), start + BATCH_ROWS, len(positions))
            batch = positions[start:stop]
            results: dict[int, RowResult] = {}
            for entry in np.lexsort((index.offset[batch], index.file[batch])).tolist():
                results[entry] = self.result(int(batch[entry]))
            yield [results[entry] for entry in range(len(batch))]
            start, num_bytes = stop, int(ends[stop - 1])

    def result(self, position: int) -> RowResult:
        """Return the result that entry `position` of the index points to.

        Raises:
            DamagedRecord: its checksum is wrong.
            DpgenError: the segment can't be read.
        """
        return decode_result(self.payload(position))

    def payload(self, position: int) -> bytes:
        """Return the record that entry `position` of the index points to; raises as `result` does."""
        index = self.index
        row, file = int(index.row[position]), int(index.file[position])
        start = int(index.offset[position]) - fmt.FRAME_HEADER.size
        try:
            frame = _read_at(self._get_fd(file), start, fmt.FRAME_HEADER.size + int(index.length[position]))
        except OSError as error:
            raise make_read_error(index.files[file], error) from None
        payload = fmt.decode_payload(frame, row) if len(frame) >= fmt.FRAME_HEADER.size else None
        if payload is None:
            raise DamagedRecord(index.files[file], row)
        return payload

    def _get_fd(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
        else:
            if len(self._open) >= self._max_open_files:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(self.index.files[file], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[file]


def make_read_error(path: Path, error: OSError) -> DpgenError:
    """Return the error for a segment that can't be read."""
    return DpgenError(
        f"the journal {path} can't be read: {error.strerror}. Its rows may be intact: fix the disk or the permissions, "
        "then rerun the same command to resume"
    )


def _get_sort_key(path: Path) -> tuple[int, int, int]:
    key = fmt.parse_name(path.name)
    assert key is not None
    return key


def _merge(files: Sequence[Path], frames: list[Frames], *, are_kept: bool = True) -> JournalIndex:
    """Return one index over segments in their order; empties `frames` on the way to save memory.

    Args:
        are_kept: index the one result of each row that counts, or else all others.
    """
    count = sum(map(len, frames))
    key, offset = np.empty(count, np.int64), np.empty(count, np.int64)
    length, file, error = np.empty(count, np.uint32), np.empty(count, np.int32), np.empty(count, bool)
    stop = count
    while frames:
        last = frames.pop()
        part = slice(stop - len(last), stop)
        key[part] = last.row * 2 + last.error
        offset[part], length[part], file[part], error[part] = last.offset, last.length, len(frames), last.error
        stop = part.start
    # A stable sort: by row, completions first, then the order of segments and frames.
    order = np.argsort(key, kind="stable")
    key = key[order]
    key >>= 1
    keep = np.ones(count, dtype=bool)
    keep[1:] = key[1:] != key[:-1]
    keep = keep if are_kept else ~keep
    row, order = key[keep], order[keep]
    del key
    offset = offset[order]
    return JournalIndex(tuple(files), row, file[order], offset, length[order], error[order])


def _read_sealed(path: Path, data: bytes, indexed: Frames) -> SegmentContents:
    """Check a segment with a sound index: each frame is sound where the index locates it, or is damaged."""
    scanned, _ = fmt.scan_frames(data)
    if len(scanned) == len(indexed):
        return SegmentContents(path, indexed, is_sealed=True)
    starts = (indexed.offset - fmt.FRAME_HEADER.size).tolist()
    ends = (indexed.offset + indexed.length).tolist()
    is_sound = np.array(
        [
            fmt.decode_payload(data[start:end], row) is not None
            for start, end, row in zip(starts, ends, indexed.row.tolist(), strict=True)
        ],
        dtype=bool,
    )
    unsound = np.flatnonzero(~is_sound)
    damage = "its first bytes are damaged"
    if len(unsound):
        first = unsound[0]
        damage = (
            f"{format_count(len(unsound), 'damaged record')}, "
            f"the first at byte {starts[first]} (row {indexed.row[first]})"
        )
    return SegmentContents(path, indexed.select(is_sound), is_sealed=True, damage=damage)


def _read_unsealed(path: Path, data: bytes) -> SegmentContents:
    """Check a segment without a sound index: its frames count up to the first unsound one."""
    frames, end = fmt.scan_frames(data)
    was_sealed = fmt.index_offset(data[-fmt.TRAILER.size :], len(data)) is not None
    if was_sealed or fmt.has_frame_after(data, end):
        return SegmentContents(path, frames, damage=f"unsound from byte {end} of {len(data)}")
    return SegmentContents(path, frames, torn_bytes=len(data) - end)


def _read_index(fd: int, size: int) -> Frames | None:
    start = fmt.index_offset(_read_at(fd, max(0, size - fmt.TRAILER.size), fmt.TRAILER.size), size)
    if start is None:
        return None
    header = _read_at(fd, 0, fmt.HEADER_BYTES)
    frame = _read_at(fd, start, size - fmt.TRAILER.size - start)
    return fmt.read_index(frame, start, header[len(fmt.MAGIC) :])


def _read_at(fd: int, offset: int, length: int) -> bytes:
    """Read `length` bytes, or fewer if the file ends before."""
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
