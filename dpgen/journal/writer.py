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
from dpgen.journal.files import Files
from dpgen.journal.segment import Group, SegmentFile, cant_be_written
from dpgen.records import RowResult, encode

SEGMENT_BYTES = 64 << 20
SYNC_INTERVAL_S = 0.5
_GROUP_BYTES = 8 << 20  # a group of this size is written at once
_MOST_WAITING_BYTES = 64 << 20  # then the caller waits: a slow disk must not fill the memory
_STALLED_S = 300.0


class Journal:
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
        files: Files | None = None,
    ) -> None:
        self.num_rows = self.num_synced_rows = self.num_bytes = 0
        self.paths: list[Path] = []
        self._folder, self._attempt, self._rank = folder, attempt, rank
        self._files = files or Files()
        self._segment_bytes, self._sync_interval_s = segment_bytes, sync_interval_s
        self._changed = threading.Condition()  # guards all below
        self._waiting = Group()
        self._writing_since_s: float | None = None
        self._hurry = self._closing = self._closed = False
        self._broken: str | None = None
        try:
            self._segment: SegmentFile | None = self._open_next()
        except OSError as error:
            raise DpgenError(cant_be_written(self.path, error)) from None
        # A daemon: a thread that hangs in a dead disk's sync must not keep the process from ending.
        self._writer = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._writer.start()

    @property
    def path(self) -> Path:
        return self.paths[-1]

    def append(self, result: RowResult) -> None:
        """Takes a result; waits only where the disk is far behind."""
        payload = encode(result)
        flags = fmt.FLAG_ERROR if result.error is not None else 0
        with self._changed:
            self._await(lambda: len(self._waiting.data) < _MOST_WAITING_BYTES)
            assert not self._closing
            is_first = not self._waiting.rows
            self._waiting.add(result.row, flags, payload)
            self.num_rows += 1
            if is_first or len(self._waiting.data) >= _GROUP_BYTES:
                self._changed.notify_all()

    def tick(self) -> None:
        """Raises what has gone wrong beside the caller; writing needs no tick."""
        with self._changed:
            self._raise_if_broken()

    def sync(self) -> None:
        """Waits until everything appended so far is safe."""
        with self._changed:
            wanted = self.num_rows
            self._hurry = True
            self._changed.notify_all()
            self._await(lambda: self.num_synced_rows >= wanted)

    def close(self) -> None:
        """Writes, syncs and seals everything; does nothing the second time."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
            self._await(lambda: self._closed)
        self._writer.join()

    def _await(self, condition: Callable[[], bool]) -> None:
        self._raise_if_broken()
        while not condition():
            self._changed.wait(1.0)
            self._raise_if_broken()

    def _raise_if_broken(self) -> None:
        if self._broken is None and self._writing_since_s is not None:
            stalled_s = time.monotonic() - self._writing_since_s
            if stalled_s > _STALLED_S:
                self._broken = cant_be_written(self.path, f"the disk has not answered for {stalled_s:.0f} s")
        if self._broken is not None:
            raise DpgenError(self._broken)

    # ---- beside the caller

    def _write_all(self) -> None:
        """The writer's life: group after group, until all is written or one can't be."""
        try:
            while (group := self._next_group()) is not None:
                self._write(group)
            if self._broken is None:
                self._seal()
        except OSError as error:
            self._break(error)
        except BaseException as error:  # noqa: BLE001 - the thread's boundary: the caller raises it
            self._break(f"{type(error).__name__}: {error}")
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _next_group(self) -> Group | None:
        """Waits for a group that is due; None when there will be no more."""
        with self._changed:
            self._writing_since_s = None
            while True:
                now_s = time.monotonic()
                group = self._waiting
                due_s = group.since_s + self._sync_interval_s
                is_due = self._closing or self._hurry or len(group.data) >= _GROUP_BYTES or now_s >= due_s
                if self._broken is not None or (self._closing and not group.rows):
                    return None
                if group.rows and is_due:
                    self._waiting, self._hurry, self._writing_since_s = Group(), False, now_s
                    self._changed.notify_all()
                    return group
                self._changed.wait(due_s - now_s if group.rows else None)

    def _write(self, group: Group) -> None:
        if self._segment is None:
            self._segment = self._open_next()
        self._segment.write(group)
        with self._changed:
            self.num_synced_rows += len(group.rows)
            self._changed.notify_all()
        if self._segment.num_bytes >= self._segment_bytes:
            self._seal()

    def _open_next(self) -> SegmentFile:
        self.paths.append(self._folder / fmt.segment_name(self._attempt, self._rank, len(self.paths)))
        return SegmentFile(self.path, self._files, self._wrote)

    def _wrote(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes

    def _seal(self) -> None:
        if self._segment is not None:
            self._writing_since_s = time.monotonic()
            self._segment.seal()
            self._segment = None

    def _break(self, cause: OSError | str) -> None:
        with self._changed:
            self._broken = self._broken or cant_be_written(self.path, cause)
            self._changed.notify_all()
        if self._segment is not None:
            self._segment.abandon()
