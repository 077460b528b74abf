"""The time that a run still takes, and how far off the estimate may be."""

from __future__ import annotations

import pytest

from dpgen.monitoring.time_left import TimeLeft, estimate_time_left


def make_samples(rates: list[float], part_s: float = 10.0) -> list[tuple[float, int]]:
    """Return (seconds, rows done) at the end of each part, given rows/s of the parts."""
    samples, num_rows = [(0.0, 0)], 0.0
    for part, rate in enumerate(rates, 1):
        num_rows += rate * part_s
        samples.append((part * part_s, round(num_rows)))
    return samples


def test_a_steady_run_has_a_narrow_range() -> None:
    left = estimate_time_left(make_samples([100.0] * 20), 10_000)
    assert left is not None and left.expected_s == pytest.approx(100)
    assert 97 < left.low_s < 100 < left.high_s < 103


def test_an_uneven_run_has_a_wide_range() -> None:
    steady = estimate_time_left(make_samples([100.0] * 16), 10_000)
    uneven = estimate_time_left(make_samples([20.0, 180.0] * 8), 10_000)
    uneven_in_blocks = estimate_time_left(make_samples([20.0, 20.0, 180.0, 180.0] * 4), 10_000)
    assert steady is not None and uneven is not None and uneven_in_blocks is not None
    assert uneven_in_blocks.high_s - uneven_in_blocks.low_s > 5 * (steady.high_s - steady.low_s)


def test_a_run_that_gets_slower_or_faster_has_its_newest_rate_in_the_range() -> None:
    slower = estimate_time_left(make_samples([100.0] * 12 + [25.0] * 4), 10_000)
    faster = estimate_time_left(make_samples([25.0] * 12 + [100.0] * 4), 10_000)
    assert slower is not None and slower.high_s >= 400
    assert faster is not None and faster.low_s <= 100


@pytest.mark.parametrize("samples", [[], [(0.0, 5)], [(5.0, 0), (5.0, 9)], [(0.0, 9), (9.0, 9)]])
def test_a_run_without_a_finished_row_says_nothing(samples: list[tuple[float, int]]) -> None:
    assert estimate_time_left(samples, 100) is None


def test_nothing_left_takes_no_time() -> None:
    assert estimate_time_left([], 0) == TimeLeft(0.0, 0.0, 0.0)


def test_few_rows_have_a_wide_range() -> None:
    left = estimate_time_left(make_samples([1.0]), 100)
    assert left is not None and left.low_s < 70 and left.high_s > 200
