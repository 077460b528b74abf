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


class SlotEngine:
    """Run rows of one length: each sequence gets 10 tokens a second, and begins as soon as a slot is free."""

    def __init__(self, row_tokens: int, seqs_per_row: int = 1) -> None:
        self._row_tokens, self._seqs_per_row = row_tokens, seqs_per_row
        self._left: list[int] = []  # tokens that each row in the engine still lacks
        self.now_s = self.num_rows = self.num_tokens = 0

    def run_second(self, limit: int) -> Sample:
        while len(self._left) * self._seqs_per_row < limit:
            self._left.append(self._row_tokens - 7 * len(self._left) % self._row_tokens)  # of all ages
        rate = 10.0 * len(self._left) * self._seqs_per_row
        left = [tokens - 10 for tokens in self._left]
        self._left = [tokens for tokens in left if tokens > 0]
        self.now_s, self.num_tokens = self.now_s + 1, self.num_tokens + int(rate)
        self.num_rows += len(left) - len(self._left)
        num_rows = len(self._left)
        return Sample(self.now_s, rate, self.num_rows, self.num_tokens, 0, num_rows * self._seqs_per_row, num_rows)

    def run_climb(self, plan: TrialPlan, largest: int, **options: float) -> Climb:
        climb = Climb(plan, largest, 1, 1_000_000, self.now_s, **options)
        while climb.reason is None:
            climb.update(self.run_second(climb.limit))
            assert self.now_s < 10_000
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
    now_s, best = sum(stage.seconds for stage in climb.stages), max(stage.tokens_per_s for stage in climb.stages[:-1])
    assert now_s <= fraction * 20_000 * ROW_TOKENS / best + 2, "the last is begun with what the ones before tell"
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


@pytest.mark.parametrize("start_s", [3, 4, 5, 6, 7, 8])
def test_a_first_number_whose_rows_do_not_end_is_measured_though_the_budget_ends_as_it_settles(start_s: int) -> None:
    climb, now_s = Climb(TrialPlan(1), 64, 1, 1000, -float(start_s), max_tokens=3000.0), 0
    while climb.reason is None:
        now_s += 1
        climb.update(Sample(float(now_s), 1100.0, 0, 1100 * now_s, 0, 64, 64))
    assert climb.error is None and get_limits(climb) == [64]


def test_limits_are_powers_around_the_first_and_the_largest() -> None:
    assert list_limits(64, 300) == [8, 16, 32, 64, 128, 256, 300]
    assert list_limits(4, 4) == [1, 2, 4]
    assert choose_next_limit({4: 10.0}, [4]) is None


@pytest.mark.parametrize("num_before", [8, 400])
def test_the_rate_of_a_stage_is_of_the_sequences_that_it_names(num_before: int) -> None:
    engine = SlotEngine(row_tokens=300)
    engine.run_second(num_before)  # more than the first stage has, where engines were full to be counted
    climb = engine.run_climb(TrialPlan(1, start_limit=32, base_limit=16, budget=Budget(seconds=900)), 64)
    assert get_limits(climb) == [32, 64, 16], "up, and then down to what is configured"
    for stage in climb.stages:
        assert stage.tokens_per_s == pytest.approx(10 * stage.max_num_seqs, rel=0.05), stage


def test_fewer_sequences_are_not_begun_if_the_others_rows_would_outlast_the_budget() -> None:
    engine = SlotEngine(row_tokens=600)
    climb = engine.run_climb(TrialPlan(1, start_limit=64, base_limit=16, budget=Budget(seconds=70)), 64)
    assert get_limits(climb) == [64]
    assert climb.reason is not None and "32 sequences would have taken" in climb.reason


def test_rows_of_several_samples_turn_as_fast_as_rows_of_one() -> None:
    def measure(seqs_per_row: int) -> Climb:
        engine = SlotEngine(row_tokens=300, seqs_per_row=seqs_per_row)
        return engine.run_climb(TrialPlan(1, start_limit=64, climbs=False, budget=Budget(seconds=900)), 64)

    one, eight = measure(1), measure(8)
    assert eight.stages[0].is_settled and eight.stages[0].seconds < 2 * one.stages[0].seconds
    assert eight.tokens_per_row == pytest.approx(8 * one.tokens_per_row, rel=0.25)


def test_a_job_of_rows_too_long_to_be_finished_is_not_taken_for_a_short_one() -> None:
    plan = TrialPlan(1, start_limit=8, climbs=False)
    climb = SlotEngine(row_tokens=10**6).run_climb(plan, 8, max_tokens=10**6)
    assert climb.estimate_job_s() == 10**12 / 80, "a million rows of as many tokens, 80 tokens/s"
    assert not climb.stages[0].is_settled
    climb = SlotEngine(row_tokens=10**6).run_climb(TrialPlan(1, start_limit=8), 16)
    assert (climb.estimate_job_s(), get_limits(climb)) == (0, [8])
    assert climb.reason == "no row was finished, which leaves open how long others take"


@pytest.mark.parametrize(("budget", "most_s"), [(Budget(seconds=9), 13), (Budget(), 120)])
def test_a_trial_without_a_rate_ends_and_says_so(budget: Budget, most_s: int) -> None:
    climb, now_s = Climb(TrialPlan(1, budget=budget), 8, 1, 1000, 0.0), 0
    while climb.reason is None:
        now_s += 1
        climb.update(Sample(now_s, None, 0, 0))
        assert now_s <= most_s + 1
    assert climb.error == climb.reason == f"the engines generated for {most_s} s, and told no rate"
