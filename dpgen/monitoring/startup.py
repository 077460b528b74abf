"""Measure a rank's start-up phases, for the line that shows what took how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from dpgen.formatting import format_duration


class StartupTimer:
    """Measure consecutive phases of a rank, of work and of waits: each starts when the one before it ends.

    Attributes:
        on_mark: called with the name of each phase that ends.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.on_mark: Callable[[str], None] = lambda name: None
        self._start_s = self._last_mark_s = clock()
        self._work: list[tuple[str, float]] = []
        self._waits: list[tuple[str, float]] = []

    def mark(self, name: str) -> None:
        """End a phase of this rank's own work, and name it."""
        self._end_phase(self._work, name)

    def mark_wait(self, name: str) -> None:
        """End a phase in which this rank waited, and name what it waited for."""
        self._end_phase(self._waits, name)

    def describe(self, engine_phases: Sequence[tuple[str, float]] = ()) -> str:
        """Return the line for the log.

        Args:
            engine_phases: what the engine process did at the same time, as (name, seconds).
        """
        parts = [_format_phases(self._work)] if self._work else []
        if self._waits:
            parts.append(f"waited for {_format_phases(self._waits)}")
        engine = f" (meanwhile the engine: {_format_phases(engine_phases)})" if engine_phases else ""
        return f"ready after {format_duration(self._last_mark_s - self._start_s)}: {', '.join(parts)}{engine}"

    def _end_phase(self, phases: list[tuple[str, float]], name: str) -> None:
        now_s = self._clock()
        phases.append((name, now_s - self._last_mark_s))
        self._last_mark_s = now_s
        self.on_mark(name)


def _format_phases(phases: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases)
