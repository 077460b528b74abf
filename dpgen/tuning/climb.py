"""Measure one engine at several numbers of sequences without restarting it, and stop where more do not pay.

- An engine runs as many sequences as it gets. So one start, with the largest number, measures all smaller ones.
- The number doubles while that makes the engine faster by more than `MIN_GAIN`; if the first doubling does not, it is
  halved while that does. The number that the job is configured with is measured in any case.
- The first number is always measured; others only while the budget lasts.
- Slots are sequences and what is finished are rows, which may have several: the rows in the engines tell how many.
- Where sequences beyond a stage's number are in the engines, their rows are finished first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dpgen.tuning.meter import RATE_WINDOW_S, Sample, SteadyMeter
from dpgen.tuning.trial import Measurement, TrialPlan

MIN_GAIN = 0.01
MIN_ROWS = 20  # finished by a trial, whose mean length tells that of all rows
_START_LIMIT = 256
_MAX_HALVINGS = 3
_MIN_SETTLE_S, _MIN_MEASURE_S = 10.0, 3.0  # of a stage, at least these are allowed
_FIRST_SETTLE_S = 120.0  # of a first stage while the budget lasts; without any rate for so long, the trial ends
# Turns of the rows in engines that begin empty, until they count as settled. In the first turn more short rows are
# finished than later, so more turns are better where they take little of the budget.
_FIRST_TURNS, _MORE_TURNS = 1.25, 2.5
_CHEAP_FRACTION = 0.2  # of the budget
_SETTLE_FRACTION, _MEASURE_FRACTION = 0.5, 0.2  # of the budget that is left, that a stage may take
_SPARE_S = 2 * RATE_WINDOW_S + 1  # of a stage, beyond one turn of the rows in the engine


def choose_start_limit(plan: TrialPlan, largest: int) -> int:
    """Return the sequences of each engine that a trial measures first, of the most that it can run."""
    base = min(plan.base_limit or largest, largest)
    return min(plan.start_limit or min(base, _START_LIMIT), largest)


def list_limits(start: int, largest: int) -> list[int]:
    """Return the numbers of sequences that a climb may try, ascending."""
    limits = {min(start, largest), largest}
    limits |= {start >> halvings for halvings in range(1, _MAX_HALVINGS + 1) if start >> halvings}
    doubled = 2 * start
    while doubled < largest:
        limits.add(doubled)
        doubled *= 2
    return sorted(limit for limit in limits if limit <= largest)


def choose_next_limit(rates: Mapping[int, float], limits: Sequence[int], base: int | None = None) -> int | None:
    """Return the number of sequences to measure next; None if the best is found.

    Args:
        rates: measured tokens/s by number of sequences, in the order in which they were measured.
        limits: see `list_limits`.
        base: a number to measure in any case.
    """
    best = max(rates, key=rates.__getitem__)
    measured = sorted(rates)
    lower = [limit for limit in measured if limit < best]
    above = [limit for limit in limits if limit > measured[-1]]
    if best == measured[-1] and above and (not lower or rates[best] > (1 + MIN_GAIN) * rates[lower[-1]]):
        return above[0]
    below = [limit for limit in limits if limit < measured[0]]
    if best == measured[0] and below and (len(measured) == 1 or rates[best] > (1 + MIN_GAIN) * rates[measured[1]]):
        return below[-1]
    return base if base is not None and base not in rates else None


class Climb:
    """Decide, sample by sample, how many sequences the engines run, and when the trial ends.

    Args:
        largest: sequences that each engine can run.
        num_engines: over all ranks.
        num_remaining: rows without a result when the trial began.
        started_s: when the trial began, on the clock of the samples; its start-up counts.
        max_tokens: of a sequence, which stands for its length while no row is finished; 0 where it is not known.

    Attributes:
        limit: sequences that each engine is to run now.
        stages: measured so far.
        reason: why the climb ended; None while it goes on.
        error: the reason, if nothing could be measured.
        has_no_rows: True if it ended because the rows ran out.
    """

    def __init__(
        self,
        plan: TrialPlan,
        largest: int,
        num_engines: int,
        num_remaining: int,
        started_s: float,
        max_tokens: float = 0.0,
    ) -> None:
        self._plan, self._num_engines, self._num_remaining = plan, num_engines, num_remaining
        self._started_s, self._max_tokens = started_s, max_tokens
        self._base = min(plan.base_limit or largest, largest)
        start = choose_start_limit(plan, largest)
        self._limits = list_limits(start, largest) if plan.climbs else [start]
        self.limit = start
        self.stages: list[Measurement] = []
        self.reason: str | None = None
        self.error: str | None = None
        self.has_no_rows = False
        self._num_preemptions = 0
        self._meter: SteadyMeter | None = None
        self._meter_began_s = started_s
        self._newest = Sample(started_s, None, 0, 0)

    def update(self, sample: Sample) -> None:
        """Take the next sample, after which `limit` or `reason` may have changed."""
        if self.reason is not None:
            return
        self._newest = sample
        if self._meter is None:
            self._meter = self._make_meter(self.limit)
        meter = self._meter
        meter.add(sample)
        is_late = self._left_s < 0
        if not self._knows_rate and not sample.is_running_out:  # the first number is measured in any case
            if is_late and sample.now_s - self._meter_began_s >= _MIN_SETTLE_S:
                meter.hurry(_MIN_MEASURE_S)
            if (error := self._find_what_fails(is_late)) is not None:
                self.fail(error)
                return
            is_late = False
        if not (meter.is_done or sample.is_running_out or is_late):
            return
        if meter.has_rate and (meter.is_done or not self.stages):
            self.stages.append(self._make_stage(meter))
        if sample.is_running_out or (is_late and not meter.is_done):
            self.has_no_rows = sample.is_running_out
            self.reason = "the rows ran out" if self.has_no_rows else "the budget was used up"
            return
        num_preempted, self._num_preemptions = sample.num_preemptions - self._num_preemptions, sample.num_preemptions
        if num_preempted > self.limit * self._num_engines // 4:
            self._limits = [limit for limit in self._limits if limit <= self.limit]  # the KV cache is full
        rates = {stage.max_num_seqs: stage.tokens_per_s for stage in self.stages}
        base = self._base if self._plan.climbs else None
        following = choose_next_limit(rates, self._limits, base) if self._plan.climbs else None
        if following is None:
            self.reason = "measured"
        elif not self.tokens_per_row:
            self.reason = "no row was finished, which leaves open how long others take"
        elif (missing_s := self._estimate_stage_s(following) - self._left_s) > 0:
            self.reason = f"{following:,} sequences would have taken {missing_s:.0f} s more than the budget has"
        else:
            self.limit = following
            self._meter = self._make_meter(following)
            self._meter.add(sample)

    def fail(self, error: str) -> None:
        """End the climb, since nothing can be measured."""
        self.reason = self.error = error

    @property
    def tokens_per_row(self) -> float:
        """Return the generated tokens of a row; 0 if nothing tells.

        All tokens of the trial, those of unfinished rows included, over its finished rows. As the engines began empty,
        these are the shorter ones, and the tokens of the others make up for that.
        """
        num_rows, before, most = self._newest.num_rows, self._plan.tokens_per_row, self._max_tokens * self.seqs_per_row
        if not num_rows or (num_rows < MIN_ROWS and before):
            return before or most
        return min(self._newest.num_tokens / num_rows, most or math.inf)

    @property
    def seqs_per_row(self) -> float:
        """Return how many of the sequences in the engines a row has; less than 1 where rows wait for anything else."""
        sample = self._newest
        return sample.num_running_seqs / sample.num_running_rows if sample.num_running_rows else 1.0

    def estimate_job_s(self) -> float:
        """Return the seconds that all remaining rows take at the best rate so far; 0 if that is unknown."""
        rate = self._best_tokens_per_s or (self._meter.newest_tokens_per_s if self._meter is not None else 0.0)
        return self._num_remaining * self.tokens_per_row / rate if rate else 0.0

    @property
    def _best_tokens_per_s(self) -> float:
        return max([self._plan.best_tokens_per_s, *(stage.tokens_per_s for stage in self.stages)])

    @property
    def _knows_rate(self) -> bool:
        return self._best_tokens_per_s > 0

    @property
    def _left_s(self) -> float:
        """Return the seconds of the budget that are left; infinity for a share of an unknown time."""
        job_s, budget = self.estimate_job_s(), self._plan.budget
        if budget.seconds is None and not job_s:
            return math.inf
        return budget.get_s(job_s) - (self._plan.spent_s + self._newest.now_s - self._started_s)

    def _find_what_fails(self, is_late: bool) -> str | None:
        """Return why the first number can't be measured; None as long as it may be."""
        assert self._meter is not None
        elapsed_s, has_rates = self._newest.now_s - self._meter_began_s, self._meter.newest_tokens_per_s > 0
        is_limited = self._plan.budget.seconds is not None and is_late and not has_rates
        if self._meter.has_rate or elapsed_s < (_MIN_SETTLE_S + _MIN_MEASURE_S if is_limited else _FIRST_SETTLE_S):
            return None
        if not has_rates:
            return f"the engines generated for {elapsed_s:.0f} s, and told no rate"
        has_surplus = is_late and self._count_surplus_rows(self.limit) > 0
        return f"the engines ran more than {self.limit:,} sequences for {elapsed_s:.0f} s" if has_surplus else None

    def _count_rows(self, limit: int) -> float:
        """Return how many rows the engines run with as many sequences each."""
        return limit * self._num_engines / (self.seqs_per_row or 1.0)

    def _count_surplus_rows(self, limit: int) -> float:
        """Return how many rows are in the engines beyond those that they are to run."""
        return max(0.0, self._newest.num_running_rows - self._count_rows(limit))

    def _estimate_stage_s(self, limit: int) -> float:
        """Return the seconds that a stage will take: one turn of its rows, after those beyond, and a measurement."""
        num_rows = self._count_rows(limit) + self._count_surplus_rows(limit)
        return num_rows * self.tokens_per_row / self._best_tokens_per_s + _SPARE_S

    def _make_meter(self, limit: int) -> SteadyMeter:
        left_s, budget = self._left_s, self._plan.budget
        left_s = 0.0 if math.isinf(left_s) else max(0.0, left_s)
        num_rows, num_surplus = self._count_rows(limit), self._count_surplus_rows(limit)
        min_settle_s = _FIRST_SETTLE_S if budget.seconds is None and not self._knows_rate else _MIN_SETTLE_S
        cheap_rows = _CHEAP_FRACTION * budget.fraction * self._num_remaining if budget.seconds is None else 0
        turns = _MORE_TURNS if _MORE_TURNS * num_rows <= cheap_rows else _FIRST_TURNS
        self._meter_began_s = self._newest.now_s
        return SteadyMeter(
            int(num_rows * (1 if self.stages else turns) + num_surplus),
            max(min_settle_s, _SETTLE_FRACTION * left_s),
            max(_MIN_MEASURE_S, _MEASURE_FRACTION * left_s),
            self._best_tokens_per_s,
            int(num_surplus),
        )

    def _make_stage(self, meter: SteadyMeter) -> Measurement:
        return Measurement(
            self.limit,
            meter.tokens_per_s,
            meter.half_width,
            meter.measured_rows,
            meter.measured_tokens,
            meter.elapsed_s,
            meter.is_settled,
            meter.is_loser,
        )
