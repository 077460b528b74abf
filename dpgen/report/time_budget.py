"""Bound the time that reading a run takes: what is not read by then is left out, and the page says so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class TimeBudget:
    """Measure how much time is left.

    Args:
        seconds: None for no limit.
    """

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deadline_s = math.inf if seconds is None else clock() + seconds

    @property
    def is_spent(self) -> bool:
        """Return True if reading must end now."""
        return self._clock() >= self._deadline_s
