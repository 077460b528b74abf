"""Measure each rank's throughput and latencies, and find stragglers; each rank shares its rate with its totals."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

_WINDOW_S = 10.0
_STRAGGLER_FRACTION = 0.7  # of the other ranks' median; a rank below it is a straggler
UNKNOWN_RATE = -1
_MIN_LATENCY_S = 1 / 64
_BINS_PER_DOUBLING = 4
_MAX_LATENCY_BINS = 84  # up to 9 hours; the last bin holds all that took longer


class LatencyHistogram:
    """Count durations in bins that widen with them, four to each doubling.

    Attributes:
        counts: of each bin, up to the last that is not empty. Bin b ends at `get_latency_bin_end_s(b)`.
    """

    def __init__(self) -> None:
        self.counts: list[int] = []

    def record(self, latency_s: float) -> None:
        """Count one duration in seconds."""
        bin = math.ceil(_BINS_PER_DOUBLING * math.log2(max(latency_s, _MIN_LATENCY_S) / _MIN_LATENCY_S))
        bin = min(bin, _MAX_LATENCY_BINS - 1)
        if bin >= len(self.counts):
            self.counts += [0] * (bin + 1 - len(self.counts))
        self.counts[bin] += 1


def get_latency_bin_end_s(bin: int) -> float:
    """Return the longest duration that a bin of a `LatencyHistogram` counts, in seconds."""
    return _MIN_LATENCY_S * math.pow(2.0, bin / _BINS_PER_DOUBLING)


class ThroughputMeter:
    """Measure generated tokens per second over the last ten seconds, or a little more.

    Steps may take longer than a short window: its rate is then of the last two samples.

    Args:
        window_s: over how many seconds.
        min_window_s: after how many seconds there is a rate; None for `window_s`.
    """

    def __init__(self, window_s: float = _WINDOW_S, *, min_window_s: float | None = None) -> None:
        self._window_s, self._min_window_s = window_s, window_s if min_window_s is None else min_window_s
        self._max_gap_s = max(window_s, _WINDOW_S)  # between samples
        self._samples: deque[tuple[float, int]] = deque()  # (time in seconds, generated tokens so far)

    def record(self, now_s: float, num_generated_tokens: int) -> None:
        """Add the rank's generated tokens so far; call about once a second while the rank generates."""
        if self._samples and now_s - self._samples[-1][0] > self._max_gap_s:
            self._samples.clear()  # the engine restarted or was idle meanwhile, which is no measure of its speed
        self._samples.append((now_s, num_generated_tokens))
        while len(self._samples) > 2 and now_s - self._samples[1][0] >= self._window_s:
            self._samples.popleft()

    def reset(self) -> None:
        """Drop all samples, since an idle rank's rate is no measure of its speed."""
        self._samples.clear()

    def get_tokens_per_s(self, now_s: float) -> int:
        """Return whole tokens/s; `UNKNOWN_RATE` if the rank has not generated for long enough, or not lately."""
        if not self._samples:
            return UNKNOWN_RATE
        (first_s, first_tokens), (last_s, last_tokens) = self._samples[0], self._samples[-1]
        if last_s - first_s < self._min_window_s or now_s - last_s > self._max_gap_s:
            return UNKNOWN_RATE
        return round((last_tokens - first_tokens) / (last_s - first_s))


def find_stragglers(rates: Sequence[int]) -> list[tuple[int, float]]:
    """Return each rank well below the others' median, with its rate as a fraction of that; the slowest first.

    Args:
        rates: tokens/s by rank; `UNKNOWN_RATE` excludes a rank.
    """
    working = sorted((rate, rank) for rank, rate in enumerate(rates) if rate != UNKNOWN_RATE)
    num_others = len(working) - 1
    stragglers = []
    for place, (rate, rank) in enumerate(working if num_others > 0 else ()):
        middle = [k + (k >= place) for k in ((num_others - 1) // 2, num_others // 2)]  # in `working`, without this one
        others = (working[middle[0]][0] + working[middle[1]][0]) / 2
        fraction = rate / others if others else 1.0
        if fraction >= _STRAGGLER_FRACTION:
            break  # those that follow are faster, and their others' medians are not higher
        stragglers.append((rank, fraction))
    return stragglers


def find_straggler(rates: Sequence[int]) -> tuple[int, float] | None:
    """Return the first of `find_stragglers`; None if no rank is a straggler."""
    return next(iter(find_stragglers(rates)), None)


def compute_slowdowns(rates: Sequence[int]) -> list[float]:
    """Return the mean rate of the other ranks over each rank's own rate; 1 for a rank whose rate is unknown.

    Args:
        rates: tokens/s by rank, as for `find_straggler`.
    """
    working = [rate for rate in rates if rate != UNKNOWN_RATE]
    if len(working) < 2:
        return [1.0] * len(rates)
    total, num_others = sum(working), len(working) - 1
    return [1.0 if rate == UNKNOWN_RATE else (total - rate) / num_others / max(1, rate) for rate in rates]
