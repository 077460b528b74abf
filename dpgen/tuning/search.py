"""Choose which settings to try next, and find the best of those that were tried.

- First the job's own settings, at several numbers of sequences in one start of the engines (`climb`). Then one change
  at a time on top of the best so far, the most promising first; a change that pays stays.
- A trial is worth its time only if the gain that it may bring saves more than a start of the engines costs, and if the
  budget holds a start and a measurement. So a short job is tuned by its first trial alone. Where even one start takes
  more than the budget's share of the job, the job is too short to tune, and the reason says so.
- Nothing is chosen that was not measured. A change must be better by `MIN_GAIN`, and by more than the two rates may be
  wrong: noise is no gain.
- While no row was finished, the job's time may be unknown. Then nothing is concluded from it.
- The same results give the same next trial: a search that is continued repeats no trial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpgen.formatting import format_duration
from dpgen.tuning.climb import MIN_GAIN, MIN_ROWS
from dpgen.tuning.meter import RATE_WINDOW_S
from dpgen.tuning.space import ENGINES_PER_RANK, MAX_NUM_SEQS, TENSOR_PARALLEL, Candidate, draws_others
from dpgen.tuning.trial import Budget, Measurement, TrialPlan, TrialResult

_MEASURE_S = 4 * RATE_WINDOW_S  # of a trial, beyond one turn of the rows in the engines


@dataclass(frozen=True)
class Choice:
    """Hold the best settings.

    Attributes:
        overrides: configuration key → value, `engine.max_num_seqs` included.
    """

    overrides: Mapping[str, Any]
    stage: Measurement
    trial: TrialResult


class Search:
    """Propose trials, and take their results.

    Args:
        first: overrides of the first trial.
        base_limit: sequences of each engine as the job is configured; None for the engine's default.
        find_candidates: returns the changes to try, given the first result.

    Attributes:
        results: of all trials, in order.
        reason: why no further trial is proposed; "" while one may be.
    """

    def __init__(
        self,
        first: Mapping[str, Any],
        base_limit: int | None,
        budget: Budget,
        find_candidates: Callable[[TrialResult], list[Candidate]],
    ) -> None:
        self._first, self._base_limit, self.budget = dict(first), base_limit, budget
        self._find_candidates = find_candidates
        self._candidates: list[Candidate] | None = None
        self._current: Candidate | None = None
        self.results: list[TrialResult] = []
        self.best: Choice | None = None
        self.reason = ""

    # ---- trials

    def propose(self) -> TrialPlan | None:
        """Return the next trial; None once there is none worth its time, and `reason` says why."""
        number = len(self.results) + 1
        if self.best is None:
            if not self.results:
                return TrialPlan(1, self._first, None, self._base_limit, budget=self.budget)
            if len(self.results) == 1 and self._first:  # the engine may not start with as many sequences
                return TrialPlan(2, {}, None, self._base_limit, budget=self.budget, spent_s=self.spent_s)
            self.reason = "the job's own settings could not be measured"
            return None
        self._current = self._take_candidate()
        if self._current is None:
            return None
        overrides = {**self.best.overrides, **self._current.overrides}
        limit = self.best.stage.max_num_seqs
        climbs = self._current.climbs
        start = self._current.start_limit or limit
        if ENGINES_PER_RANK in self._current.overrides:
            # As many sequences in all, to begin with.
            start = max(1, limit * self._count_engines_per_rank() // self._current.overrides[ENGINES_PER_RANK])
        if TENSOR_PARALLEL in self._current.overrides:
            overrides[MAX_NUM_SEQS] = 2 * limit  # one engine in place of several, or the other way round
        return TrialPlan(
            number,
            overrides,
            min(start, overrides[MAX_NUM_SEQS]),
            start if climbs else limit,
            climbs,
            self.best.stage.tokens_per_s,
            self.budget,
            self.spent_s,
            self.tokens_per_row,
        )

    def record(self, result: TrialResult) -> None:
        """Take the result of the trial that was proposed last."""
        self.results.append(result)
        stage, before = result.best_stage, self.best
        is_better = stage is not None and (
            before is None or (stage.is_settled and is_surely_faster(stage, before.stage))
        )
        if stage is not None and is_better:
            self.best = Choice({**result.overrides, MAX_NUM_SEQS: stage.max_num_seqs}, stage, result)
        if before is None:
            if self.best is not None:
                self._candidates = list(self._find_candidates(result))
            return
        if is_better and self._current is not None and self._current.follows is not None:
            assert self._candidates is not None
            self._candidates.insert(0, self._current.follows)

    def _take_candidate(self) -> Candidate | None:
        """Return the next candidate that is worth a trial; the reason is that of the most promising one that is not."""
        assert self._candidates is not None and self.best is not None
        job_s, left_s = self.job_s, self.budget.get_s(self.job_s) - self.spent_s
        first_stage_s = max(result.first_stage_s for result in self.results)
        cost_s = self.start_s + max(self._estimate_turn_s() + _MEASURE_S, first_stage_s)
        while self._candidates:
            candidate = self._candidates.pop(0)
            if not self._is_possible(candidate):
                continue
            if not job_s and self.budget.seconds is None:
                self.reason = (
                    "no row was finished while it was measured, so the job's time is unknown: give --budget as a time, "
                    "such as 10m"
                )
                return None
            if cost_s > left_s:
                self.reason = self._describe_shortage(cost_s, left_s)
                return None
            if not job_s or candidate.expected_gain * job_s >= self.start_s:
                return candidate
        self.reason = "no further change promises to save more than a start of the engines costs"
        return None

    def _is_possible(self, candidate: Candidate) -> bool:
        """Return False for what the best settings have, and for several engines on several GPUs."""
        assert self.best is not None
        best, tried = self.best.overrides, candidate.overrides
        has_several_gpus = best.get(TENSOR_PARALLEL, 1) > 1 and TENSOR_PARALLEL not in tried
        return not (tried.items() <= best.items() or (has_several_gpus and tried.get(ENGINES_PER_RANK, 1) > 1))

    def _describe_shortage(self, cost_s: float, left_s: float) -> str:
        budget_s = self.budget.get_s(self.job_s)
        if self.budget.seconds is None and self.start_s > budget_s:
            return (
                f"the job is too short to tune within {100 * self.budget.fraction:g} % of its time: it takes about "
                f"{format_duration(self.job_s)}, and a start of the engines alone {self.start_s:.0f} s. What is "
                "measured is from its first start"
            )
        return (
            f"another trial would take about {cost_s:.0f} s, and {max(0.0, left_s):.0f} s of the budget of "
            f"{budget_s:.0f} s are left"
        )

    # ---- estimates

    @property
    def spent_s(self) -> float:
        """Return the seconds that all trials took."""
        return sum(result.wall_s for result in self.results)

    @property
    def start_s(self) -> float:
        """Return the seconds that a start takes, by the fastest of those so far."""
        return min((result.start_s for result in self.results if result.stages), default=0.0)

    @property
    def tokens_per_row(self) -> float:
        """Return the generated tokens of a row, over all that was measured; 0 if nothing tells."""
        num_rows = sum(result.num_finished for result in self.results)
        if num_rows >= MIN_ROWS:
            return sum(result.num_tokens for result in self.results) / num_rows
        return next((result.tokens_per_row for result in self.results if result.tokens_per_row), 0.0)

    @property
    def job_s(self) -> float:
        """Return the seconds that the whole job takes with the best settings, without its start; 0 if unknown."""
        return 0.0 if self.best is None else self.estimate_job_s(self.best.stage.tokens_per_s)

    def estimate_job_s(self, tokens_per_s: float) -> float:
        """Return the seconds that all rows without a result before tuning take at a rate; 0 if that is unknown."""
        # A trial that draws other samples has a run of its own, in which no row is done.
        own = [result.num_remaining for result in self.results if not draws_others(result.overrides)]
        return max(own, default=0) * self.tokens_per_row / tokens_per_s

    def _count_engines_per_rank(self) -> int:
        assert self.best is not None
        return max(1, self.best.trial.num_engines // max(1, self.best.trial.num_ranks))

    def _estimate_turn_s(self) -> float:
        assert self.best is not None
        stage, trial = self.best.stage, self.best.trial
        num_rows = stage.max_num_seqs * trial.num_engines / (trial.seqs_per_row or 1.0)
        return num_rows * self.tokens_per_row / stage.tokens_per_s


def is_surely_faster(stage: Measurement, other: Measurement) -> bool:
    """Return True if a rate is above another by `MIN_GAIN`, and their 95 % confidence intervals are apart."""
    gain = stage.tokens_per_s - other.tokens_per_s
    return gain > max(MIN_GAIN * other.tokens_per_s, stage.half_width + other.half_width)
