"""Test each rank's throughput, and which ranks are stragglers."""

from __future__ import annotations

import pytest

from dpgen.scheduling.throughput import UNKNOWN_RATE, ThroughputMeter, compute_slowdowns, find_straggler


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


def test_a_slowdown_is_the_others_mean_rate_over_the_own_rate() -> None:
    assert compute_slowdowns([100, 50, 200, UNKNOWN_RATE]) == [1.25, 3.0, 0.375, 1.0]
    assert compute_slowdowns([UNKNOWN_RATE, 50]) == [1.0, 1.0] and compute_slowdowns([]) == []
    assert compute_slowdowns([0, 300]) == [300.0, 0.0]
