"""Settings are tried one change at a time, while they may save more than they cost; what pays stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dpgen.tuning.search import Search
from dpgen.tuning.space import ENGINES_PER_RANK, MAX_NUM_SEQS, TENSOR_PARALLEL, Candidate
from dpgen.tuning.table import format_table, list_rows
from dpgen.tuning.trial import Budget, Measurement, TrialPlan, TrialResult

HOUR = Budget(seconds=3600)


def make_result(plan: TrialPlan, rate: float, wall_s: float = 30, num_rows: int = 100_000) -> TrialResult:
    stage = Measurement(plan.start_limit or 256, rate, 1.0, 1000, 200_000, 10.0)
    result = TrialResult(plan.number, dict(plan.overrides), (stage,), 10.0, wall_s, 1000, num_rows, 256)
    return dataclasses.replace(result, num_tokens=200_000, num_finished=1000)


def run_search(search: Search, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Give each trial the product of its settings' factors on 1,000 tokens/s; return the settings of all trials."""
    tried = []
    while (plan := search.propose()) is not None:
        tried.append({key: value for key, value in plan.overrides.items() if key != MAX_NUM_SEQS})
        rate = 1000.0
        for key in tried[-1]:
            rate *= rates.get(f"{key}={tried[-1][key]}", 1.0)
        search.record(make_result(plan, rate))
    return tried


def make_search(candidates: list[Candidate], budget: Budget = HOUR) -> Search:
    return Search({}, 256, budget, lambda first: candidates)


def test_a_change_that_pays_stays_and_others_are_dropped() -> None:
    candidates = [Candidate({"engine.a": 1}, 0.1), Candidate({"engine.b": 1}, 0.1), Candidate({"engine.c": 1}, 0.1)]
    search = make_search(candidates)
    tried = run_search(search, {"engine.a=1": 1.2, "engine.b=1": 0.9, "engine.c=1": 1.005})
    assert tried == [{}, {"engine.a": 1}, {"engine.a": 1, "engine.b": 1}, {"engine.a": 1, "engine.c": 1}]
    assert search.best is not None
    assert dict(search.best.overrides) == {"engine.a": 1, MAX_NUM_SEQS: 256}, "half a per cent is no gain"


def test_noise_is_no_gain() -> None:
    search = make_search([Candidate({"engine.a": 1}, 0.1), Candidate({"engine.b": 1}, 0.1)])
    for rate, half_width in [(1000.0, 15.0), (1025.0, 15.0), (1035.0, 15.0)]:
        plan = search.propose()
        assert plan is not None
        stage = Measurement(256, rate, half_width, 1000, 200_000, 10.0)
        search.record(dataclasses.replace(make_result(plan, rate), stages=(stage,)))
    assert search.best is not None
    assert dict(search.best.overrides) == {"engine.b": 1, MAX_NUM_SEQS: 256}, "only the last is surely faster"


def test_nothing_is_concluded_from_a_job_whose_time_is_unknown() -> None:
    for budget, num_trials in [(Budget(), 1), (HOUR, 2)]:
        search = make_search([Candidate({"engine.a": 1}, 0.1)], budget)
        while (plan := search.propose()) is not None:
            search.record(dataclasses.replace(make_result(plan, 1000), num_tokens=0, num_finished=0))
        assert len(search.results) == num_trials, "a budget in seconds is known in any case"
        row = list_rows(search, 256, num_gpus=1)[0]
        assert (row.job_s, row.gpu_hours) == (None, None)
        assert "unknown" in list(format_table([row], has_gpus=True))[1]
        assert ("the job's time is unknown: give --budget as a time" in search.reason) == (budget is not HOUR)


def test_a_trial_in_a_run_of_its_own_does_not_lengthen_the_job() -> None:
    speculative = {"engine.speculative_config": {"method": "ngram"}}
    search = make_search([Candidate(speculative, 0.1)])
    for num_remaining in (1000, 50_000):  # most rows of the run are done
        plan = search.propose()
        assert plan is not None
        search.record(make_result(plan, 1000.0, num_rows=num_remaining))
    assert search.job_s == 1000 * 200 / 1000


def test_one_engine_more_is_tried_after_one_that_paid() -> None:
    third = Candidate({ENGINES_PER_RANK: 3}, 0.05, climbs=True)
    search = make_search([Candidate({ENGINES_PER_RANK: 2}, 0.05, climbs=True, follows=third)])
    rates = {f"{ENGINES_PER_RANK}=2": 1.5, f"{ENGINES_PER_RANK}=3": 1.4}
    assert run_search(search, rates) == [{}, {ENGINES_PER_RANK: 2}, {ENGINES_PER_RANK: 3}]
    assert search.best is not None and search.best.overrides[ENGINES_PER_RANK] == 2


def test_no_trial_repeats_the_best_or_has_several_engines_on_several_gpus() -> None:
    tensor = Candidate({TENSOR_PARALLEL: 2, ENGINES_PER_RANK: 1}, 0.1, climbs=True)
    search = make_search([tensor, Candidate({ENGINES_PER_RANK: 2}, 0.05), Candidate({ENGINES_PER_RANK: 1}, 0.03)])
    assert run_search(search, {f"{TENSOR_PARALLEL}=2": 1.5}) == [{}, dict(tensor.overrides)]


def test_no_trial_is_made_that_the_budget_has_no_time_for() -> None:
    search = make_search([Candidate({"engine.a": 1}, 0.5)], Budget(seconds=40))
    assert run_search(search, {}) == [{}]
    assert "10 s of the budget of 40 s are left" in search.reason


def test_a_job_of_which_one_start_is_too_large_a_share_is_too_short_to_tune() -> None:
    search = make_search([Candidate({"engine.a": 1}, 0.5)], Budget(fraction=0.05))
    plan = search.propose()
    assert plan is not None
    search.record(make_result(plan, 2000.0, num_rows=1000))  # 200 tokens each, in 100 s, after a start of 10 s
    assert search.propose() is None
    assert search.reason.startswith(
        "the job is too short to tune within 5 % of its time: it takes about 1 min 40 s, and a start of the engines "
        "alone 10 s"
    )


def test_no_trial_is_made_whose_gain_would_not_pay_for_its_start() -> None:
    search = make_search([Candidate({"engine.a": 1}, 0.0001)])
    assert run_search(search, {}) == [{}]
    assert "save more than a start" in search.reason


def test_a_trial_that_fails_is_a_line_and_not_the_end() -> None:
    search = make_search([Candidate({"engine.a": 1}, 0.1), Candidate({"engine.b": 1}, 0.1)])
    first = search.propose()
    assert first is not None
    search.record(make_result(first, 1000))
    second = search.propose()
    assert second is not None
    search.record(TrialResult(2, dict(second.overrides), error="out of memory"))
    third = search.propose()
    assert third is not None and third.overrides == {"engine.b": 1, MAX_NUM_SEQS: 256}
    assert search.best is not None and search.best.trial.number == 1


def test_an_engine_that_can_not_run_more_sequences_is_started_as_configured() -> None:
    search = Search({MAX_NUM_SEQS: 1024}, 256, HOUR, lambda first: [])
    first = search.propose()
    assert first is not None and first.overrides == {MAX_NUM_SEQS: 1024}
    search.record(TrialResult(1, dict(first.overrides), error="out of memory"))
    second = search.propose()
    assert second is not None and second.overrides == {}
    search.record(TrialResult(2, {}, error="out of memory"))
    assert search.propose() is None
    assert search.best is None


def test_the_same_results_give_the_same_next_trial() -> None:
    def make() -> Search:
        return make_search([Candidate({"engine.a": 1}, 0.1), Candidate({"engine.b": 1}, 0.05)])

    search, other = make(), make()
    run_search(search, {"engine.a=1": 1.1})
    for result in search.results:
        plan = other.propose()
        assert plan is not None and dict(plan.overrides) == dict(result.overrides)
        other.record(result)
    assert other.propose() is None
