"""Which ranks are slow."""

from __future__ import annotations

import pytest

from dpgen.scheduling.throughput import UNKNOWN_RATE, ThroughputMeter, compute_slowdowns, find_straggler


def test_the_rate_is_that_of_the_last_ten_seconds() -> None:
    pace = ThroughputMeter()
    assert pace.get_tokens_per_s(0) == UNKNOWN_RATE
    for second in range(30):
        pace.record(float(second), 100 * min(second, 20))
        assert pace.get_tokens_per_s(second) == (
            UNKNOWN_RATE if second < 10 else 100 if second <= 20 else 100 * (30 - second) // 10
        )
    assert pace.get_tokens_per_s(45) == UNKNOWN_RATE, (
        "nothing was heard of its engine for long: that is another matter than being slow"
    )
    pace.reset()
    assert pace.get_tokens_per_s(29) == UNKNOWN_RATE


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
def test_a_rank_well_under_the_others_median_is_slow(rates: list[int], expected: tuple[int, float] | None) -> None:
    assert find_straggler(rates) == expected


def test_slowness_is_what_the_others_reach_on_average_over_the_own_rate() -> None:
    assert compute_slowdowns([100, 50, 200, UNKNOWN_RATE]) == [1.25, 3.0, 0.375, 1.0]
    assert compute_slowdowns([UNKNOWN_RATE, 50]) == [1.0, 1.0] and compute_slowdowns([]) == []
    assert compute_slowdowns([0, 300]) == [300.0, 0.0]


def test_a_gap_is_no_slow_pace() -> None:
    pace = ThroughputMeter()
    for second in range(12):
        pace.record(float(second), 100 * second)
    for second in range(60, 72):  # its engine was started anew
        pace.record(float(second), 1200 + 100 * (second - 60))
        assert pace.get_tokens_per_s(second) == (UNKNOWN_RATE if second < 70 else 100)
