"""Which ranks are slow."""

from __future__ import annotations

import pytest

from dpgen.scheduling.throughput import IDLE, Pace, slowest, slowness


def test_the_rate_is_that_of_the_last_ten_seconds() -> None:
    pace = Pace()
    assert pace.rate(0) == IDLE
    for second in range(30):
        pace.note(float(second), 100 * min(second, 20))
        assert pace.rate(second) == (IDLE if second < 10 else 100 if second <= 20 else 100 * (30 - second) // 10)
    assert pace.rate(45) == IDLE, "nothing was heard of its engine for long: that is another matter than being slow"
    pace.rest()
    assert pace.rate(29) == IDLE


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([], None),
        ([100], None),
        ([100, 80], None),
        ([100, 50], (1, 0.5)),
        ([100, 110, 40, 90], (2, 0.4)),
        ([100, 110, IDLE, 90], None),
        ([0, 110, IDLE, 90], (0, 0.0)),
        ([0, 0], None),
    ],
)
def test_a_rank_well_under_the_others_median_is_slow(rates: list[int], expected: tuple[int, float] | None) -> None:
    assert slowest(rates) == expected


def test_slowness_is_what_the_others_reach_on_average_over_the_own_rate() -> None:
    assert slowness([100, 50, 200, IDLE]) == [1.25, 3.0, 0.375, 1.0]
    assert slowness([IDLE, 50]) == [1.0, 1.0] and slowness([]) == []
    assert slowness([0, 300]) == [300.0, 0.0]


def test_a_gap_is_no_slow_pace() -> None:
    pace = Pace()
    for second in range(12):
        pace.note(float(second), 100 * second)
    for second in range(60, 72):  # its engine was started anew
        pace.note(float(second), 1200 + 100 * (second - 60))
        assert pace.rate(second) == (IDLE if second < 70 else 100)
