"""Start-up, phase by phase: what took so long, and whom a rank that is ready waits for."""

from __future__ import annotations

import time
from collections.abc import Callable

from dpgen.formatting import format_duration

_FIRST_NOTICE_S = 10.0
_NOTICE_INTERVAL_S = 30.0


class StartupTimer:
    """A stop watch: each phase lasts from the end of the one before it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = self._last_s = clock()
        self._ended: list[tuple[str, float]] = []

    def mark(self, name: str) -> None:
        """Ends a phase."""
        now_s = self._clock()
        self._ended.append((name, now_s - self._last_s))
        self._last_s = now_s

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._ended)
        return f"ready after {format_duration(self._last_s - self._began_s)}: {phases}"


class PeriodicLog:
    """Says what is waited for, once it has taken a while and then now and then; call it as often as you like.

    Args:
        say: prints a line.
        line: what to say, made when it is said.
    """

    def __init__(
        self, say: Callable[[str], None], make_message: Callable[[], str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._line, self._clock = say, make_message, clock
        self._due_s = clock() + _FIRST_NOTICE_S

    def __call__(self) -> None:
        if self._clock() >= self._due_s:
            self._due_s = self._clock() + _NOTICE_INTERVAL_S
            self._say(self._line())
