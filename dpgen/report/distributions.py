"""Put numbers into the bars of a histogram, and into the few figures below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpgen.report.charts import Bar
from dpgen.report.numbers import format_number, format_seconds
from dpgen.scheduling.progress.throughput import get_latency_bin_end_s

_BINS = 40
_OUTLIER_FACTOR = 4  # times the 99th percentile: beyond that, the last bar takes all


@dataclass(frozen=True)
class Distribution:
    """Hold a histogram with its ticks, (fraction of the width, text), and its figures, (name, text)."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]
    figures: list[tuple[str, str]]


def describe_lengths(values: Sequence[int]) -> Distribution | None:
    """Return the distribution of numbers of tokens; None if there are none."""
    if not values:
        return None
    numbers = np.array(values, dtype=np.int64)
    low, high, top = int(numbers.min()), int(numbers.max()), float(np.percentile(numbers, 99))
    is_cut = high > _OUTLIER_FACTOR * max(1.0, top)
    end = max(low + 1, int(2 * top) if is_cut else high + 1)
    num_bins = min(_BINS, end - low)
    edges = np.linspace(low, end, num_bins + 1)
    counts, _ = np.histogram(np.minimum(numbers, end - 1), edges)
    bars = []
    for bin, count in enumerate(counts.tolist()):
        first, last = int(np.ceil(edges[bin])), int(np.ceil(edges[bin + 1])) - 1
        where = f"{first:,} or more" if is_cut and bin == num_bins - 1 else f"{first:,} to {last:,}"
        bars.append(
            Bar(bin / num_bins, (bin + 1) / num_bins, count, f"{where if first != last else first} tokens: {count:,}")
        )
    ticks = [(x / 4, f"{low + (end - 1 - low) * x / 4:,.0f}{'+' if is_cut and x == 4 else ''}") for x in range(5)]
    if end - low <= 8:
        ticks = [((place + 0.5) / (end - low), f"{low + place:,}") for place in range(end - low)]
    return Distribution(bars, ticks, _list_figures(numbers))


def _list_figures(numbers: np.ndarray) -> list[tuple[str, str]]:
    percentiles = [("median", 50), ("90 %", 90), ("99 %", 99)]
    figures = [(name, format_number(float(np.percentile(numbers, q)))) for name, q in percentiles]
    return [("mean", format_number(float(numbers.mean()))), *figures, ("max", format_number(int(numbers.max())))]


def describe_latencies(counts: Sequence[int]) -> Distribution | None:
    """Return the distribution of latencies by the counts of a `LatencyHistogram`; None if there are none."""
    total = sum(counts)
    if not total:
        return None
    first = next(bin for bin, count in enumerate(counts) if count)
    used = counts[first:]
    bars = []
    for place, count in enumerate(used):
        low, high = (get_latency_bin_end_s(bin) for bin in (first + place - 1, first + place))
        text = f"{format_seconds(low)} to {format_seconds(high)}: {count:,}"
        bars.append(Bar(place / len(used), (place + 1) / len(used), count, text))
    step = max(1, len(used) // 4)
    ticks = [
        ((place + 1) / len(used), format_seconds(get_latency_bin_end_s(first + place)))
        for place in range(step - 1, len(used), step)
    ]
    sums = np.cumsum(counts)
    quantiles = [("median", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("max", 1.0)]
    figures = [
        (name, f"≤ {format_seconds(get_latency_bin_end_s(int(np.searchsorted(sums, total * q))))}")
        for name, q in quantiles
    ]
    return Distribution(bars, ticks, figures)
