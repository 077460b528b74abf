"""A steady rate is measured: neither the ramp-up nor the last rows count, and losers are not measured to the end."""

from __future__ import annotations

import random

from dpgen.tuning.meter import Sample, SteadyMeter


def feed(meter: SteadyMeter, rates: list[float], rows_per_s: int = 50) -> int:
    """Give the meter one rate a second until it is done; return the seconds."""
    for second, rate in enumerate(rates):
        meter.add(Sample(float(second), rate, second * rows_per_s, second * 1000))
        if meter.is_done:
            return second
    raise AssertionError("the meter was not done")


def test_the_ramp_up_does_not_count() -> None:
    meter = SteadyMeter(100, max_settle_s=60, max_measure_s=60)
    feed(meter, [10, 300, 700, 900, *[1000.0] * 20])
    assert meter.is_settled
    assert meter.tokens_per_s == 1000


def test_a_rate_that_still_falls_is_not_settled_although_the_rows_have_turned() -> None:
    meter = SteadyMeter(400, max_settle_s=60, max_measure_s=60)  # the long rows are still young
    feed(meter, [2000 - 40 * second for second in range(25)] + [1000.0] * 100)
    assert meter.tokens_per_s < 1050


def test_settling_is_given_up_in_time_and_said() -> None:
    meter = SteadyMeter(10_000, max_settle_s=10, max_measure_s=3)
    assert feed(meter, [1000.0] * 60) <= 14
    assert not meter.is_settled


def test_the_rows_at_the_end_do_not_count() -> None:
    meter = SteadyMeter(10, max_settle_s=10, max_measure_s=60)
    for second in range(30):
        rate = 1000.0 if second < 8 else 100.0
        meter.add(Sample(float(second), rate, 50 * second, 1000 * second, is_running_out=second >= 8))
    assert meter.tokens_per_s == 1000


def test_a_noisy_rate_is_measured_for_longer() -> None:
    noise = random.Random(0)
    rates = [1000 + noise.gauss(0, 60) for _ in range(200)]
    noisy, exact = SteadyMeter(10, 2, 100), SteadyMeter(10, 2, 100)
    assert feed(noisy, rates) > feed(exact, [1000.0] * 200) + 5
    assert abs(noisy.tokens_per_s - 1000) < 2 * noisy.half_width


def test_what_is_surely_slower_is_not_measured_to_the_end() -> None:
    noise = random.Random(0)
    rates = [500 + noise.gauss(0, 50) for _ in range(100)]
    loser = SteadyMeter(10, 2, 100, best_tokens_per_s=1000)
    assert feed(loser, rates) < 10
    assert loser.is_loser


def test_a_rate_that_is_told_again_counts_once() -> None:
    meter = SteadyMeter(0, max_settle_s=2, max_measure_s=60)
    for second in range(12):
        step = second // 4  # of 4 s, and each second has the rate of the last one
        meter.add(Sample(float(second), 1000.0 + step, 0, 4000 * step))
    assert not meter.is_done, "two steps are not enough"
