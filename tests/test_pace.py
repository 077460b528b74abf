"""Which rank is slow."""

from __future__ import annotations

import pytest

from dpgen.pace import IDLE, Pace, slowest


def test_the_rate_is_that_of_the_last_ten_seconds() -> None:
    pace = Pace()
    assert pace.rate() == IDLE
    for second in range(30):
        pace.note(float(second), 100 * min(second, 20))
        assert pace.rate() == (IDLE if second < 10 else 100 if second <= 20 else 100 * (30 - second) // 10)
    pace.rest()
    assert pace.rate() == IDLE


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
