"""Test each rank's throughput, and which ranks are stragglers."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest

from dpgen.scheduling.progress.throughput import (
    UNKNOWN_RATE,
    LatencyHistogram,
    ThroughputMeter,
    compute_slowdowns,
    find_straggler,
    find_stragglers,
    get_latency_bin_end_s,
)


def test_the_rate_covers_the_last_ten_seconds() -> None:
    meter = ThroughputMeter()
    assert meter.get_tokens_per_s(0) == UNKNOWN_RATE
    for second in range(30):
        meter.record(float(second), 100 * min(second, 20))
        assert meter.get_tokens_per_s(second) == (
            UNKNOWN_RATE if second < 10 else 100 if second <= 20 else 100 * (30 - second) // 10
        )
    assert meter.get_tokens_per_s(45) == UNKNOWN_RATE, "an engine that reports nothing for long is not merely slow"
    meter.reset()
    assert meter.get_tokens_per_s(29) == UNKNOWN_RATE


def test_a_pause_does_not_count_as_slow() -> None:
    meter = ThroughputMeter()
    for second in range(12):
        meter.record(float(second), 100 * second)
    for second in range(60, 72):  # the engine restarted meanwhile
        meter.record(float(second), 1200 + 100 * (second - 60))
        assert meter.get_tokens_per_s(second) == (UNKNOWN_RATE if second < 70 else 100)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([], None),
        ([100], None),
        ([100, 80], None),
        ([100, 50], (1, 0.5)),
        ([100, 110, 40, 90], (2, 0.4)),
        ([100, 110, UNKNOWN_RATE, 90], None),
        ([0, 110, UNKNOWN_RATE, 90], (0, 0.0)),
        ([0, 0], None),
    ],
)
def test_a_rank_well_below_the_others_median_is_a_straggler(
    rates: list[int], expected: tuple[int, float] | None
) -> None:
    assert find_straggler(rates) == expected


def test_all_stragglers_are_found_the_slowest_first() -> None:
    assert find_stragglers([100, 40, UNKNOWN_RATE, 110, 20, 105, 95]) == [(4, 0.2), (1, 0.4)]
    rates = [int(rate) for rate in np.random.default_rng(0).integers(0, 200, 51)]
    expected = []
    for rank, rate in enumerate(rates):
        fraction = rate / median(rates[:rank] + rates[rank + 1 :])
        expected += [(fraction, rank)] if fraction < 0.7 else []
    assert [(fraction, rank) for rank, fraction in find_stragglers(rates)] == sorted(expected)


def test_a_meter_may_answer_before_its_window_is_full() -> None:
    meter = ThroughputMeter(60.0, min_window_s=1.0)
    meter.record(0.0, 0)
    assert meter.get_tokens_per_s(0) == UNKNOWN_RATE
    meter.record(20.0, 400)
    assert meter.get_tokens_per_s(20) == 20


def test_a_slowdown_is_the_others_mean_rate_over_the_own_rate() -> None:
    assert compute_slowdowns([100, 50, 200, UNKNOWN_RATE]) == [1.25, 3.0, 0.375, 1.0]
    assert compute_slowdowns([UNKNOWN_RATE, 50]) == [1.0, 1.0] and compute_slowdowns([]) == []
    assert compute_slowdowns([0, 300]) == [300.0, 0.0]


def test_latencies_are_counted_in_bins_that_widen() -> None:
    latencies = LatencyHistogram()
    for seconds in (0.0, 1 / 64, 0.02, 1.0, 1.0, 1e9):
        latencies.record(seconds)
    assert sum(latencies.counts) == 6 and latencies.counts[0] == 2 and latencies.counts[24] == 2
    assert get_latency_bin_end_s(24) == 1.0 and latencies.counts[-1] == 1 and len(latencies.counts) == 84


def test_steps_longer_than_the_window_have_a_rate() -> None:
    meter = ThroughputMeter(2.0)
    for step in range(4):
        meter.record(2.3 * step, 23 * step)
    assert meter.get_tokens_per_s(2.3 * 3 + 2.2) == 10
    assert meter.get_tokens_per_s(2.3 * 3 + 11) == UNKNOWN_RATE
