"""Limit the time that rendering one row may take: a pathological row must not stop its rank for good.

- SIGALRM interrupts the main thread: Python code (templates, slow tokenizers) and regular expressions within
  milliseconds. A tokenizer in Rust or C returns first; the row is rejected then.
- The alarm raises a BaseException, since rendering code catches Exception: a template is a program. Where such code
  swallows the alarm, the next one follows.
- The limit counts processor time of the main thread, and any time in which the process runs beyond twice the limit. So
  no row is blamed for a busy machine, or for a process that was stopped for an hour.
- One timer runs for all rows within a `RenderTimer`, whichever part of dpgen renders them: a row sets none, and looks
  whether it still runs, for less than 1 us. Elsewhere, and after a row that has taken the process's timer for itself,
  each row has a timer of its own, for 10 us.
- Limits: the main thread only, elsewhere a row may take any time. A process has one such timer: one that is running
  already continues after the block.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, ClassVar, TypeVar

from dpgen.errors import RenderTimeout

A = TypeVar("A")
T = TypeVar("T")

_ALARMS_PER_LIMIT = 4
_TOLERANCE = 0.95  # of the limit: the processor time between two alarms is a little less than the time between them


def limit_render_time(render: Callable[[A], T], limit_s: float) -> Callable[[A], T]:
    """Return a function like `render` that raises RenderTimeout where one call takes longer than `limit_s`."""

    def render_in_time(row: A) -> T:
        timer = RenderTimer.running
        if timer is not None and timer.covers(limit_s):
            return timer.run(render, row)
        with RenderTimer(limit_s) as own_timer:
            return own_timer.run(render, row)

    return render_in_time


class RenderTimer:
    """Limit each of many calls within one block.

    Example:
        with RenderTimer(60.0) as timer:
            render_in_time = timer.limit(render)
            prompts = [render_in_time(row) for row in rows]

    Attributes:
        running: the timer of the innermost block that the main thread is in; None outside of all.
    """

    running: ClassVar[RenderTimer | None] = None

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._is_active = self._is_rendering = False
        self._num_alarms, self._cpu_at_first_alarm_s = 0, 0.0

    def __enter__(self) -> RenderTimer:
        if threading.current_thread() is threading.main_thread():
            self._is_active = True
            self._outer, RenderTimer.running = RenderTimer.running, self
            self._previous_handler: Any = signal.signal(signal.SIGALRM, self._handle_alarm)
            signal.siginterrupt(signal.SIGALRM, False)  # native code need not expect EINTR
            self._started_s = time.monotonic()
            interval_s = self._limit_s / _ALARMS_PER_LIMIT
            self._previous_timer = signal.setitimer(signal.ITIMER_REAL, interval_s, interval_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_active:
            return
        self._is_active = False
        RenderTimer.running = self._outer
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._previous_handler)
        if self._outer is not None:
            signal.siginterrupt(signal.SIGALRM, False)  # which `signal.signal` resets
        remaining_s, interval_s = self._previous_timer
        if remaining_s:
            elapsed_s = time.monotonic() - self._started_s
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, remaining_s - elapsed_s), interval_s)

    def covers(self, limit_s: float) -> bool:
        """Return True if this timer limits a call in this thread to `limit_s`."""
        is_free = self._limit_s == limit_s and not self._is_rendering
        if not is_free or threading.current_thread() is not threading.main_thread():
            return False
        return signal.getitimer(signal.ITIMER_REAL)[1] > 0  # otherwise a row has set or stopped the process's timer

    def limit(self, render: Callable[[A], T]) -> Callable[[A], T]:
        """Return a function like `render`, to be called within the block.

        It raises RenderTimeout where one call takes longer than the limit.
        """
        return limit_render_time(render, self._limit_s)

    def run(self, render: Callable[[A], T], row: A) -> T:
        """Return `render(row)`, within the block.

        Raises:
            RenderTimeout: it takes longer than the limit.
        """
        try:
            self._num_alarms, self._is_rendering = 0, True
            try:
                return render(row)
            finally:
                self._is_rendering = False
        except _TimedOut:
            self._is_rendering = False  # the alarm may have come before the assignment in `finally`
            raise RenderTimeout(f"rendering took longer than data.render_timeout_s={self._limit_s:g}") from None

    def _handle_alarm(self, number: int, frame: FrameType | None) -> None:
        if not self._is_active or not self._is_rendering:
            return
        if self._num_alarms == 0:
            self._cpu_at_first_alarm_s = time.thread_time()
        self._num_alarms += 1
        cpu_s = time.thread_time() - self._cpu_at_first_alarm_s
        if cpu_s >= _TOLERANCE * self._limit_s or self._num_alarms > 2 * _ALARMS_PER_LIMIT:
            raise _TimedOut


class _TimedOut(BaseException):
    """Unwind the interrupted call."""
