"""Log to stderr: one handler on the logger `dpgen`, and a filter that lets rank 0 speak for all.

- INFO and below come from rank 0 alone, WARNING and above from every rank.
- Lines printed by an engine belong to the logger `dpgen.engine.output`; they show its rank and "engine".
- Only `setup_logging` adds a handler, to `dpgen` and never to the root: an application's own logging stays as it is.
- Logging never blocks and never ends a run. A thread writes the lines. While stderr is full, closed or not read, the
  newest lines are dropped and counted.

Limits: a signal handler must not log, since the interrupted thread may hold the handler's lock; it uses `os.write`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, TextIO

ENGINE_OUTPUT = "dpgen.engine.output"
LogFormat = Literal["text", "json"]

_MAX_QUEUED_LINES = 10_000
_FLUSH_TIMEOUT_S = 2.0
_FIRST_NOTICE_S = 10.0
_NOTICE_INTERVAL_S = 30.0
_WAIT_POLL_S = 0.1


def setup_logging(rank: int, log_format: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Let the logger `dpgen` write to stderr; a second call replaces the first one's handler and ends its thread.

    Args:
        rank: the rank that each line names.
        log_format: "text" for people, "json" for one JSON object a line (time, level, rank, logger, message).
        stream: where lines go; None for `sys.stderr` as it is when a line is written.
    """
    logger = logging.getLogger("dpgen")
    for earlier in _find_handlers():
        logger.removeHandler(earlier)
        earlier.close()
    handler = _StreamHandler(stream)
    handler.setFormatter(_JsonFormatter(rank) if log_format == "json" else _TextFormatter(rank))
    handler.addFilter(lambda record: rank == 0 or record.levelno >= logging.WARNING)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def flush_logging() -> bool:
    """Wait until the lines logged so far are written, for two seconds at most; return False if some are not."""
    return all(handler.flush_lines() for handler in _find_handlers())


def write_to_stderr(text: str) -> None:
    """Write text as it stands, after the lines logged so far; wait for two seconds at most.

    Use it for the closing error, which is no log line: a `print` raises or blocks while stderr is full, closed or not
    read, and this does neither.
    """
    handlers = _find_handlers()
    if not handlers:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
        return
    for handler in handlers:
        handler.write_raw(text)
        handler.flush()


class NoticeTimer:
    """Time the notices of one wait: the first is due after 10 s, the next 30 s later, and so on.

    Args:
        growth: by how much each interval exceeds the one before; 1 for equal ones.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, growth: float = 1.0) -> None:
        self._clock, self._growth = clock, growth
        self._due_s, self._interval_s = clock() + _FIRST_NOTICE_S, _NOTICE_INTERVAL_S

    def is_due(self) -> bool:
        """Return True if a notice is due, once for each notice."""
        if self._clock() < self._due_s:
            return False
        self._due_s = self._clock() + self._interval_s
        self._interval_s *= self._growth
        return True


class PeriodicLog:
    """Log what a rank waits for: after 10 s for the first time, then every 30 s. Call it as often as you like.

    Args:
        logger: logs the message.
        make_message: returns the message when it is due.
        on_all_ranks: log a warning, which all ranks may, and double the interval each time.
    """

    def __init__(
        self,
        logger: logging.Logger,
        make_message: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
        *,
        on_all_ranks: bool = False,
    ) -> None:
        self._logger, self._make_message = logger, make_message
        self._level = logging.WARNING if on_all_ranks else logging.INFO
        self._timer = NoticeTimer(clock, growth=2.0 if on_all_ranks else 1.0)

    def __call__(self) -> None:
        if self._timer.is_due():
            self._logger.log(self._level, self._make_message())


@contextlib.contextmanager
def log_while_waiting(logger: logging.Logger, make_message: Callable[[], str]) -> Iterator[None]:
    """Log on any rank what the block waits for, from a thread: for calls that don't return for minutes.

    Args:
        make_message: returns whom the block waits for, and why; called in the thread.
    """
    periodic_log, ended = PeriodicLog(logger, make_message, on_all_ranks=True), threading.Event()

    def watch() -> None:
        while not ended.wait(_WAIT_POLL_S):
            periodic_log()

    thread = threading.Thread(target=watch, name="wait-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _find_handlers() -> list[_StreamHandler]:
    return [handler for handler in logging.getLogger("dpgen").handlers if isinstance(handler, _StreamHandler)]


class _TextFormatter(logging.Formatter):
    """Format ``2026-11-26 15:34:45 INFO [rank 0] 512 rows over 2 ranks``."""

    def __init__(self, rank: int) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        part = " engine" if record.name == ENGINE_OUTPUT else ""
        prefix = f"{self.formatTime(record, self.datefmt)} {record.levelname} [rank {self._rank}{part}] "
        return prefix + _get_message(record, self)


class _JsonFormatter(logging.Formatter):
    """Format ``{"time": 1795707285.123, "level": "INFO", "rank": 0, "logger": "dpgen.run", "message": "..."}``."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {
                "time": round(record.created, 3),
                "level": record.levelname,
                "rank": self._rank,
                "logger": record.name,
                "message": _get_message(record, self),
            }
        )


def _get_message(record: logging.LogRecord, formatter: logging.Formatter) -> str:
    """Return the message, and below it the traceback where the record has one."""
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001 - a mistake in a log call must not end the run
        message = f"{record.msg!r} with the arguments {record.args!r}"
    return f"{message}\n{formatter.formatException(record.exc_info)}" if record.exc_info else message


class _StreamHandler(logging.Handler):
    """Write each line with one call, from a thread, so that lines of several ranks don't run into each other."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._stream = stream
        # A str is written, an Event is set once all before it is written, and None ends the thread.
        self._lines: queue.Queue[str | threading.Event | None] = queue.Queue(_MAX_QUEUED_LINES)
        self._is_closed = False
        self._num_dropped = 0
        self._counter_lock = threading.Lock()
        # A daemon: a reader that never reads must not keep the process from ending.
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        self.write_raw(self.format(record))

    def write_raw(self, text: str) -> None:
        """Queue text and a newline; drop and count them where the queue is full."""
        try:
            self._lines.put_nowait(f"{text}\n")
        except queue.Full:
            self._count_dropped(1)

    def flush(self) -> None:
        self.flush_lines()

    def flush_lines(self) -> bool:
        """Wait until the queued lines are written, for two seconds at most; return False if some are not."""
        deadline_s = time.monotonic() + _FLUSH_TIMEOUT_S
        written = threading.Event()
        try:
            self._lines.put(written, timeout=_FLUSH_TIMEOUT_S)
        except queue.Full:
            return False  # the reader does not read; the queued lines are lost with the process
        return written.wait(deadline_s - time.monotonic())

    def close(self) -> None:
        """Write the queued lines, for two seconds at most, then end the thread; lines queued later are lost."""
        self.flush_lines()
        self._is_closed = True
        with contextlib.suppress(queue.Full):  # then the thread is at work, and sees the flag next
            self._lines.put_nowait(None)
        super().close()

    def _write_all(self) -> None:
        while (item := self._lines.get()) is not None and not self._is_closed:
            if isinstance(item, threading.Event):
                item.set()
                continue
            num_dropped = self._take_num_dropped()
            note = self._format_dropped(num_dropped) if num_dropped else ""
            out = self._stream or sys.stderr
            try:
                out.write(note + item)
                out.flush()
            except Exception:  # noqa: BLE001 - a full disk or a closed stream costs lines, and not the thread
                self._count_dropped(num_dropped + 1)

    def _format_dropped(self, num_dropped: int) -> str:
        message = f"dropped {num_dropped:,} log lines, since stderr was full, closed or not read"
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, None, None)
        return f"{self.format(record)}\n"

    def _count_dropped(self, number: int) -> None:
        with self._counter_lock:
            self._num_dropped += number

    def _take_num_dropped(self) -> int:
        with self._counter_lock:
            number, self._num_dropped = self._num_dropped, 0
        return number
