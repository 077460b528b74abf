"""The journal: every finished row, appended and synced within a second, in segments that one attempt of one rank owns.

Nothing is ever appended to another attempt's segment. A thread beside the caller writes what has come together and
syncs it as one group; what is appended meanwhile makes the next. A segment that has grown large is sealed and the
next begun: see `journal_segment` for its writing, `journal_format` for its bytes, `journal_read` for reading it back.
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
from dpgen.records import RowResult, encode_result

SEGMENT_BYTES = 64 << 20
SYNC_INTERVAL_S = 0.5
_BATCH_BYTES = 8 << 20  # a group of this size is written at once
_MAX_QUEUED_BYTES = 64 << 20  # then the caller waits: a slow disk must not fill the memory
_STALLED_S = 300.0


class JournalWriter:
    """Appends this attempt's results. A result is safe once it counts in `num_synced_rows`: within a second.

    After a write or sync has failed nothing more is written, least of all the same again: the kernel may have dropped
    the pages of a failed sync and would report the next one as done
    (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).

    Args:
        segment_bytes: a segment is sealed once it is as large; it may exceed that by one group.
        sync_interval_s: how long a result waits for others to share its sync.

    Attributes:
        paths: this attempt's segments so far; `path` is the last.
        num_rows: results appended. num_synced_rows: of those, from the first on, the ones that are safe.
        num_bytes: bytes written to the segments, their indices included.

    Raises:
        DpgenError: from any method, once something could not be written: the run must stop, and can be resumed.
    """

    def __init__(
        self,
        folder: Path,
        attempt: int,
        rank: int,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        sync_interval_s: float = SYNC_INTERVAL_S,
        files: FileSystem | None = None,
    ) -> None:
        self.num_rows = self.num_synced_rows = self.num_bytes = 0
        self.paths: list[Path] = []
        self._folder, self._attempt, self._rank = folder, attempt, rank
        self._files = files or FileSystem()
        self._segment_bytes, self._sync_interval_s = segment_bytes, sync_interval_s
        self._condition = threading.Condition()  # guards all below
        self._waiting = WriteBatch()
        self._writing_since_s: float | None = None
        self._flush_requested = self._closing = self._closed = False
        self._error: str | None = None
        try:
            self._segment: SegmentWriter | None = self._open_next()
        except OSError as error:
            raise DpgenError(format_write_error(self.path, error)) from None
        # A daemon: a thread that hangs in a dead disk's sync must not keep the process from ending.
        self._writer = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._writer.start()

    @property
    def path(self) -> Path:
        return self.paths[-1]

    def append(self, result: RowResult) -> None:
        """Takes a result; waits only where the disk is far behind."""
        payload = encode_result(result)
        flags = fmt.FLAG_ERROR if result.error is not None else 0
        with self._condition:
            self._wait_until(lambda: len(self._waiting.data) < _MAX_QUEUED_BYTES)
            assert not self._closing
            is_first = not self._waiting.rows
            self._waiting.add(result.row, flags, payload)
            self.num_rows += 1
            if is_first or len(self._waiting.data) >= _BATCH_BYTES:
                self._condition.notify_all()

    def raise_if_failed(self) -> None:
        """Raises what has gone wrong beside the caller; writing needs no tick."""
        with self._condition:
            self._raise_error()

    def sync(self) -> None:
        """Waits until everything appended so far is safe."""
        with self._condition:
            wanted = self.num_rows
            self._flush_requested = True
            self._condition.notify_all()
            self._wait_until(lambda: self.num_synced_rows >= wanted)

    def close(self) -> None:
        """Writes, syncs and seals everything; does nothing the second time."""
        with self._condition:
            if self._closing:
                return
            self._closing = True
            self._condition.notify_all()
            self._wait_until(lambda: self._closed)
        self._writer.join()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        self._raise_error()
        while not condition():
            self._condition.wait(1.0)
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is None and self._writing_since_s is not None:
            stalled_s = time.monotonic() - self._writing_since_s
            if stalled_s > _STALLED_S:
                self._error = format_write_error(self.path, f"the disk has not answered for {stalled_s:.0f} s")
        if self._error is not None:
            raise DpgenError(self._error)

    # ---- beside the caller

    def _write_all(self) -> None:
        """The writer's life: group after group, until all is written or one can't be."""
        try:
            while (group := self._next_batch()) is not None:
                self._write(group)
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
        """Waits for a group that is due; None when there will be no more."""
        with self._condition:
            self._writing_since_s = None
            while True:
                now_s = time.monotonic()
                group = self._waiting
                due_s = group.first_append_s + self._sync_interval_s
                is_due = self._closing or self._flush_requested or len(group.data) >= _BATCH_BYTES or now_s >= due_s
                if self._error is not None or (self._closing and not group.rows):
                    return None
                if group.rows and is_due:
                    self._waiting, self._flush_requested, self._writing_since_s = WriteBatch(), False, now_s
                    self._condition.notify_all()
                    return group
                self._condition.wait(due_s - now_s if group.rows else None)

    def _write(self, group: WriteBatch) -> None:
        if self._segment is None:
            self._segment = self._open_next()
        self._segment.write(group)
        with self._condition:
            self.num_synced_rows += len(group.rows)
            self._condition.notify_all()
        if self._segment.num_bytes >= self._segment_bytes:
            self._seal()

    def _open_next(self) -> SegmentWriter:
        self.paths.append(self._folder / fmt.segment_name(self._attempt, self._rank, len(self.paths)))
        return SegmentWriter(self.path, self._files, self._wrote)

    def _wrote(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes

    def _seal(self) -> None:
        if self._segment is not None:
            self._writing_since_s = time.monotonic()
            self._segment.seal()
            self._segment = None

    def _fail(self, cause: OSError | str) -> None:
        with self._condition:
            self._error = self._error or format_write_error(self.path, cause)
            self._condition.notify_all()
        if self._segment is not None:
            self._segment.abandon()
