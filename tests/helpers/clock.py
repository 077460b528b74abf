"""Replace a clock by one that stands still until the test moves it."""

from __future__ import annotations


class FakeClock:
    """Return `now_s` when called, in place of `time.monotonic` or `time.time`."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s
