"""Estimate the time that a run still takes, and how far off the estimate may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

_NUM_BLOCKS = 8
_MAX_ERROR = 0.9  # of the rate; beyond it the upper end says nothing


@dataclass(frozen=True)
class TimeLeft:
    """Hold seconds that a run still takes: what is expected, and a range that it is likely in."""

    expected_s: float
    low_s: float
    high_s: float


def estimate_time_left(samples: Sequence[tuple[float, int]], num_remaining: int) -> TimeLeft | None:
    """Return the time left for the remaining rows; None before a row is finished.

    Rows go on being finished as they were so far, on average. The range covers the rate of the last quarter, and twice
    the standard error of the rates of up to eight parts of the time, but at least that of a count.

    Args:
        samples: (seconds, rows finished by then), from the start of generating, oldest first.
    """
    if num_remaining <= 0:
        return TimeLeft(0.0, 0.0, 0.0)
    if len(samples) < 2:
        return None
    (first_s, first_rows), (last_s, last_rows) = samples[0], samples[-1]
    elapsed_s, num_rows = last_s - first_s, last_rows - first_rows
    if num_rows <= 0 or elapsed_s <= 0:
        return None
    rate = num_rows / elapsed_s
    rates = _measure_rates(samples)
    error = 1 / sqrt(num_rows)
    if len(rates) > 2:
        mean = sum(rates) / len(rates)
        variance = sum((part - mean) ** 2 for part in rates) / (len(rates) - 1)
        error = max(error, sqrt(variance / len(rates)) / rate)
    error = min(2 * error, _MAX_ERROR)
    recent = _measure_rates([sample for sample in samples if sample[0] >= last_s - elapsed_s / 4], num_parts=1)
    likely = [rate, *(part for part in recent if part > 0)]
    expected_s = num_remaining / rate
    return TimeLeft(expected_s, num_remaining / max(likely) / (1 + error), num_remaining / min(likely) / (1 - error))


def _measure_rates(samples: Sequence[tuple[float, int]], num_parts: int = _NUM_BLOCKS) -> list[float]:
    """Return rows/s of parts of the time, of about the same length each."""
    if len(samples) < 2:
        return []
    rates, (start_s, start_rows) = [], samples[0]
    part_s = (samples[-1][0] - start_s) / num_parts
    for now_s, num_rows in samples[1:]:
        if now_s - start_s >= part_s * 0.999 and now_s > start_s:
            rates.append((num_rows - start_rows) / (now_s - start_s))
            start_s, start_rows = now_s, num_rows
    return rates
