"""Measure a rank's start-up phases, for the line that shows what took how long."""

from __future__ import annotations

import time
from collections.abc import Callable

from dpgen.formatting import format_duration


class StartupTimer:
    """Measure consecutive phases: each starts when the one before it ends. `str` gives the line for the log.

    Attributes:
        on_mark: called with the name of each phase that ends.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.on_mark: Callable[[str], None] = lambda name: None
        self._start_s = self._last_mark_s = clock()
        self._phases: list[tuple[str, float]] = []

    def mark(self, name: str) -> None:
        """End a phase and name it."""
        now_s = self._clock()
        self._phases.append((name, now_s - self._last_mark_s))
        self._last_mark_s = now_s
        self.on_mark(name)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._phases)
        return f"ready after {format_duration(self._last_mark_s - self._start_s)}: {phases}"
