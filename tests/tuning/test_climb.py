"""One engine is measured at several numbers of sequences: upwards while that pays, within the budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dpgen.tuning.climb import Climb, choose_next_limit, list_limits
from dpgen.tuning.meter import Sample
from dpgen.tuning.trial import Budget, TrialPlan

ROW_TOKENS = 20


def run_climb(
    plan: TrialPlan, largest: int, get_rate: Callable[[int], float], num_rows: int = 1_000_000, num_engines: int = 1
) -> Climb:
    """Climb on engines whose rate follows from their number of sequences alone."""
    climb, now_s, num_tokens = Climb(plan, largest, num_engines, num_rows, 0.0), 0.0, 0.0
    while climb.reason is None:
        rate = get_rate(climb.limit)
        now_s, num_tokens = now_s + 1, num_tokens + rate
        num_finished = int(num_tokens / ROW_TOKENS)
        climb.update(Sample(now_s, rate, num_finished, int(num_tokens), is_running_out=num_finished >= num_rows))
        assert now_s < 10_000
    return climb


def get_limits(climb: Climb) -> list[int]:
    return [stage.max_num_seqs for stage in climb.stages]


def test_the_number_of_sequences_is_doubled_while_that_pays() -> None:
    climb = run_climb(TrialPlan(1, base_limit=64), 1024, lambda limit: 100 * min(limit, 256) - limit)
    assert get_limits(climb) == [64, 128, 256, 512]
    assert max(climb.stages, key=lambda stage: stage.tokens_per_s).max_num_seqs == 256


def test_it_is_halved_where_more_is_worse() -> None:
    climb = run_climb(TrialPlan(1, base_limit=128), 512, lambda limit: 10_000 - 10 * limit)
    assert get_limits(climb) == [128, 256, 64, 32, 16]


def test_the_number_of_the_configuration_is_measured_in_any_case() -> None:
    climb = run_climb(TrialPlan(1, base_limit=None), 1024, lambda limit: 10_000 - 9 * limit)
    assert get_limits(climb)[:2] == [256, 512]
    assert get_limits(climb)[-1] == 1024


def test_a_trial_of_another_setting_measures_one_number() -> None:
    assert get_limits(run_climb(TrialPlan(2, start_limit=96, climbs=False), 128, lambda limit: 1000.0)) == [96]


def test_a_number_that_the_budget_has_no_time_for_is_not_begun() -> None:
    climb = run_climb(TrialPlan(1, base_limit=8, budget=Budget(seconds=12)), 1024, lambda limit: 40.0 * limit)
    assert get_limits(climb) == [8]
    assert climb.reason is not None and "16 sequences would have taken" in climb.reason


@pytest.mark.parametrize("fraction", [0.05, 0.2])
def test_all_trials_together_stay_within_their_share_of_the_job(fraction: float) -> None:
    def get_rate(limit: int) -> float:
        return 1000.0 * limit / (limit + 200)

    plan = TrialPlan(1, base_limit=64, budget=Budget(fraction=fraction))
    climb = run_climb(plan, 1024, get_rate, num_rows=20_000)
    now_s = sum(stage.seconds for stage in climb.stages)
    assert now_s <= fraction * climb.estimate_job_s() + 2
    assert len(climb.stages) >= 1


def test_a_job_whose_rows_run_out_is_left_to_finish() -> None:
    climb = run_climb(TrialPlan(1, base_limit=64, budget=Budget(seconds=500)), 1024, lambda _: 1000.0, num_rows=200)
    assert climb.has_no_rows
    assert climb.reason == "the rows ran out"


def test_no_more_sequences_are_tried_once_the_kv_cache_is_full() -> None:
    climb, now_s = Climb(TrialPlan(1, base_limit=64), 1024, 1, 10**9, 0.0), 0.0
    while climb.reason is None:
        now_s += 1
        num_preemptions = 0 if climb.limit < 128 else 1000
        climb.update(Sample(now_s, 100.0 * climb.limit, int(now_s) * 500, int(now_s) * 10_000, num_preemptions))
    assert get_limits(climb) == [64, 128]


def test_limits_are_powers_around_the_first_and_the_largest() -> None:
    assert list_limits(64, 300) == [8, 16, 32, 64, 128, 256, 300]
    assert list_limits(4, 4) == [1, 2, 4]
    assert choose_next_limit({4: 10.0}, [4]) is None
