"""Append every finished row to the journal and sync it within a second.

- A segment belongs to one attempt of one rank; no other attempt ever appends to it.
- A thread writes the queued rows as one batch and syncs it. Rows appended meanwhile form the next batch.
- A segment that has grown large is sealed, and the next one is opened. One without rows is removed in the end.
- After a failed write or sync nothing more is written.

`segment` writes one segment, `format` defines its bytes, `reader` reads the rows back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from dpgen.errors import DpgenError
from dpgen.journal import format as fmt
from dpgen.journal.files import FileSystem
from dpgen.journal.segment import SegmentWriter, WriteBatch, format_write_error
from dpgen.records import RowResult
from dpgen.result_codec import encode_result

SEGMENT_BYTES = 64 << 20
SYNC_INTERVAL_S = 0.5
_BATCH_BYTES = 8 << 20  # a batch of this size is written at once
_MAX_QUEUED_BYTES = 64 << 20  # `append` blocks above this size, so that a slow disk does not fill the memory
_STALLED_S = 300.0


class JournalWriter:
    """Append this attempt's results. A result is safe, within a second, once `num_synced_rows` counts it.

    After a write or sync has failed, nothing is written again, least of all the same data: the kernel may have dropped
    the pages of a failed sync and would report the next sync as successful
    (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).

    Args:
        segment_bytes: a segment is sealed at this size; its last batch may exceed it.
        sync_interval_s: how long a result waits for others to share its sync.

    Attributes:
        attempt, rank: of the segments' names.
        paths: this attempt's segments so far. Closing the journal removes one without rows.
        path: the last segment that was opened.
        before_first_write: called once, in the thread, before the first rows are written; may raise OSError. Set it
            before the first `append`.
        num_rows: results appended.
        num_synced_rows: results that are safe; the first ones, in the order of appending.
        num_bytes: bytes written to the segments, indices included.

    Raises:
        DpgenError: from every method, once something could not be written. The run must stop, and can be resumed.
    """

    def __init__(
        self,
        journal_dir: Path,
        attempt: int,
        rank: int,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        sync_interval_s: float = SYNC_INTERVAL_S,
        files: FileSystem | None = None,
    ) -> None:
        self.num_rows = self.num_synced_rows = self.num_bytes = 0
        self._num_records = self._num_synced_records = 0  # rejected attempts included
        self.paths: list[Path] = []
        self._journal_dir, self.attempt, self.rank = journal_dir, attempt, rank
        self._files = files or FileSystem()
        self._segment_bytes, self._sync_interval_s = segment_bytes, sync_interval_s
        self.before_first_write: Callable[[], None] = lambda: None
        self._condition = threading.Condition()  # guards all attributes below
        self._queued = WriteBatch()
        self._writing_since_s: float | None = None
        self._flush_requested = self._seal_requested = self._closing = self._closed = False
        self._error: str | None = None
        try:
            self._segment: SegmentWriter | None = self._open_next()
        except OSError as error:
            raise DpgenError(format_write_error(self.path, error)) from None
        # A daemon: a thread that hangs in the sync of a dead disk must not keep the process alive.
        self._thread = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._thread.start()

    def append(self, result: RowResult) -> None:
        """Queue a result; blocks only if the disk is far behind."""
        self._append(result.row, fmt.FLAG_ERROR if result.error is not None else 0, encode_result(result))

    def append_attempt(self, row: int, record: bytes) -> None:
        """Queue a rejected attempt at a row, which has no result by it; see `dpgen.journal.attempts`."""
        self._append(row, fmt.FLAG_ATTEMPT, record)

    def _append(self, row: int, flags: int, payload: bytes) -> None:
        with self._condition:
            self._wait_until(lambda: len(self._queued.data) < _MAX_QUEUED_BYTES)
            assert not self._closing
            is_first = not self._queued.rows
            self._queued.add(row, flags, payload)
            self._num_records += 1
            self.num_rows += not flags & fmt.FLAG_ATTEMPT
            if is_first or len(self._queued.data) >= _BATCH_BYTES:
                self._condition.notify_all()

    def raise_if_failed(self) -> None:
        """Raise the thread's error, if any. Rows are written without this call, too."""
        with self._condition:
            self._raise_error()

    def sync(self) -> None:
        """Wait until everything appended so far is safe."""
        with self._condition:
            num_records = self._num_records
            self._flush_requested = True
            self._condition.notify_all()
            self._wait_until(lambda: self._num_synced_records >= num_records)

    def seal(self) -> None:
        """Write, sync and seal everything so far, so that it can be read. The next result begins another segment."""
        with self._condition:
            self._seal_requested = not self._closing
            self._condition.notify_all()
            self._wait_until(lambda: not self._seal_requested)

    def close(self) -> None:
        """Write, sync and seal everything. A second call does nothing."""
        with self._condition:
            if self._closing:
                return
            self._closing = True
            self._condition.notify_all()
            self._wait_until(lambda: self._closed)
        self._thread.join()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        self._raise_error()
        while not condition():
            self._condition.wait(1.0)
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is None and self._writing_since_s is not None:
            stalled_s = time.monotonic() - self._writing_since_s
            if stalled_s > _STALLED_S:
                self._error = format_write_error(self.path, f"the disk has not responded for {stalled_s:.0f} s")
        if self._error is not None:
            raise DpgenError(self._error)

    # ---- in the thread

    def _write_all(self) -> None:
        """Write batch after batch until the journal is closed or a batch can't be written."""
        try:
            while (batch := self._next_batch()) is not None:
                if batch.rows:
                    self._write(batch)
                else:
                    self._seal()
                    with self._condition:
                        self._seal_requested = False
                        self._condition.notify_all()
            if self._error is None:
                self._seal()
        except OSError as error:
            self._fail(error)
        except BaseException as error:  # noqa: BLE001 - the thread's boundary: the caller raises it
            self._fail(f"{type(error).__name__}: {error}")
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _next_batch(self) -> WriteBatch | None:
        """Wait for a batch that is due, and return it: empty to seal the segment, None if no batch will follow."""
        with self._condition:
            self._writing_since_s = None
            while True:
                now_s = time.monotonic()
                batch = self._queued
                due_s = batch.first_append_s + self._sync_interval_s
                is_wanted = self._closing or self._flush_requested or self._seal_requested
                is_due = is_wanted or len(batch.data) >= _BATCH_BYTES or now_s >= due_s
                if self._error is not None or (self._closing and not batch.rows):
                    return None
                if batch.rows and is_due:
                    self._queued, self._flush_requested, self._writing_since_s = WriteBatch(), False, now_s
                    self._condition.notify_all()
                    return batch
                if self._seal_requested:
                    return WriteBatch()
                self._condition.wait(due_s - now_s if batch.rows else None)

    def _write(self, batch: WriteBatch) -> None:
        if not self._num_synced_records:
            self.before_first_write()
        if self._segment is None:
            self._segment = self._open_next()
        self._segment.write(batch)
        with self._condition:
            self._num_synced_records += len(batch.rows)
            self.num_synced_rows += sum(not flags & fmt.FLAG_ATTEMPT for flags in batch.flags)
            self._condition.notify_all()
        if self._segment.num_bytes >= self._segment_bytes:
            self._seal()

    def _open_next(self) -> SegmentWriter:
        self.path = self._journal_dir / fmt.segment_name(self.attempt, self.rank, len(self.paths))
        self.paths.append(self.path)
        return SegmentWriter(self.path, self._files, self._count_bytes)

    def _count_bytes(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes

    def _seal(self) -> None:
        if self._segment is not None:
            self._writing_since_s = time.monotonic()
            if not self._segment.seal():
                self.paths.remove(self.path)
            self._segment = None

    def _fail(self, cause: OSError | str) -> None:
        with self._condition:
            self._error = self._error or format_write_error(self.path, cause)
            self._condition.notify_all()
        if self._segment is not None:
            self._segment.abandon()
