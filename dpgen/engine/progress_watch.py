"""Notice an engine that is silent, or sends messages without getting anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dpgen.engine.messages import EngineStats, Event
from dpgen.engine.starting.limits import EngineLimits
from dpgen.errors import EngineHung


class ProgressWatch:
    """Measure how long one life of an engine has sent nothing, and how long it has made no progress.

    Args:
        limits: when the engine counts as hung.
        clock: seconds that only increase.
    """

    def __init__(self, limits: EngineLimits, clock: Callable[[], float]) -> None:
        self._limits, self._clock = limits, clock
        self._last_event_s = self._last_progress_s = clock()
        self._max_progress: tuple[int, ...] = EngineStats().progress  # the largest counts of this life

    def begin_life(self) -> None:
        """Count from now on, for a new process."""
        self._max_progress = EngineStats().progress
        self.mark()

    def mark(self) -> None:
        """Count the engine's silence from now on."""
        self._last_event_s = self._last_progress_s = self._clock()

    def note(self, event: Event) -> None:
        """Take a message for a sign of life, and for progress, unless its counts are those of before."""
        self._last_event_s = self._clock()
        if not isinstance(event, EngineStats):
            self._last_progress_s = self._last_event_s
            return
        largest = tuple(map(max, event.progress, self._max_progress))
        if largest != self._max_progress:
            self._max_progress, self._last_progress_s = largest, self._last_event_s

    def raise_if_hung(self, log_path: Path | None, *, is_ready: bool, is_busy: bool) -> None:
        """Raise EngineHung if the engine has made no progress for too long.

        Args:
            log_path: the engine's output, for the message.
            is_ready: whether it has loaded its model.
            is_busy: whether it has rows; one that is ready may be idle for as long as it likes.
        """
        now_s = self._clock()
        idle_s, silent_s = now_s - self._last_progress_s, now_s - self._last_event_s
        if is_ready:
            limit_s, phase = self._limits.timeout_s, "while it had work (run.engine_timeout_s"
        else:
            limit_s, phase = self._limits.start_timeout_s, "while it was starting (run.engine_start_timeout_s"
        if idle_s > limit_s and (is_busy or not is_ready):
            what = f"sent no message for {silent_s:.0f}" if silent_s > limit_s else f"made no progress for {idle_s:.0f}"
            raise EngineHung(f"the engine {what} s {phase}={limit_s:g})", log_path=log_path)
