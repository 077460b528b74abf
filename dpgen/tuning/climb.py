"""Measure one engine at several numbers of sequences without restarting it, and stop where more do not pay.

- An engine runs as many sequences as it gets. So one start, with the largest number, measures all smaller ones.
- The number doubles while that makes the engine faster by more than `MIN_GAIN`; if the first doubling does not, it is
  halved while that does. The number that the job is configured with is measured in any case.
- The first number is always measured; others only while the budget lasts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dpgen.tuning.meter import RATE_WINDOW_S, Sample, SteadyMeter
from dpgen.tuning.trial import Measurement, TrialPlan

MIN_GAIN = 0.01
_START_LIMIT = 256
_MAX_HALVINGS = 3
_MIN_SETTLE_S, _MIN_MEASURE_S = 10.0, 3.0  # of a stage, at least these are allowed
_FIRST_SETTLE_S = 120.0  # of a first stage whose rows are surely few enough for the budget
# Turns of the rows in engines that begin empty, until they count as settled. In the first turn more short rows are
# finished than later, so more turns are better where they take little of the budget.
_FIRST_TURNS, _MORE_TURNS = 1.25, 2.5
_CHEAP_FRACTION = 0.2  # of the budget
_SETTLE_FRACTION, _MEASURE_FRACTION = 0.5, 0.2  # of the budget that is left, that a stage may take
_SPARE_S = 2 * RATE_WINDOW_S + 1  # of a stage, beyond one turn of the rows in the engine


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

    Attributes:
        limit: sequences that each engine is to run now.
        stages: measured so far.
        reason: why the climb ended; None while it goes on.
        has_no_rows: True if it ended because the rows ran out.
    """

    def __init__(self, plan: TrialPlan, largest: int, num_engines: int, num_remaining: int, started_s: float) -> None:
        self._plan, self._num_engines, self._num_remaining = plan, num_engines, num_remaining
        self._started_s = started_s
        self._base = min(plan.base_limit or largest, largest)
        start = min(plan.start_limit or min(self._base, _START_LIMIT), largest)
        self._limits = list_limits(start, largest) if plan.climbs else [start]
        self.limit = start
        self.stages: list[Measurement] = []
        self.reason: str | None = None
        self.has_no_rows = False
        self._num_preemptions = 0
        self._meter = self._make_meter(plan.spent_s)

    def update(self, sample: Sample) -> None:
        """Take the next sample, after which `limit` or `reason` may have changed."""
        if self.reason is not None:
            return
        self._meter.add(sample)
        is_late = self._knows_rate and self._get_left_s(sample.now_s) < 0
        if not (self._meter.is_done or sample.is_running_out or is_late):
            return
        if self._meter.has_rate and (self._meter.is_done or not self.stages):
            self.stages.append(self._make_stage())
        if sample.is_running_out or (is_late and not self._meter.is_done):
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
        elif (missing_s := self._estimate_stage_s(following) - self._get_left_s(sample.now_s)) > 0:
            self.reason = f"{following:,} sequences would have taken {missing_s:.0f} s more than the budget has"
        else:
            self.limit = following
            self._meter = self._make_meter(self._plan.spent_s + sample.now_s - self._started_s)
            self._meter.add(sample)

    @property
    def tokens_per_row(self) -> float:
        """Return the generated tokens of a row, by what was measured; 0 before that."""
        num_rows = sum(stage.num_rows for stage in self.stages)
        return sum(stage.num_tokens for stage in self.stages) / num_rows if num_rows else self._plan.tokens_per_row

    def estimate_job_s(self) -> float:
        """Return the seconds that all remaining rows take at the best rate so far; 0 if that is unknown."""
        best = max([self._plan.best_tokens_per_s, *(stage.tokens_per_s for stage in self.stages)])
        return self._num_remaining * self.tokens_per_row / best if best else 0.0

    @property
    def _knows_rate(self) -> bool:
        return bool(self.stages) or self._plan.best_tokens_per_s > 0

    def _get_left_s(self, now_s: float) -> float:
        spent_s = self._plan.spent_s + now_s - self._started_s
        return self._plan.budget.get_s(self.estimate_job_s()) - spent_s

    def _estimate_stage_s(self, limit: int) -> float:
        """Return the seconds that a stage will take: one turn of its rows, and a measurement."""
        best = max(stage.tokens_per_s for stage in self.stages)
        return limit * self._num_engines * self.tokens_per_row / best + _SPARE_S

    def _make_meter(self, spent_s: float) -> SteadyMeter:
        left_s = max(0.0, self._plan.budget.get_s(self.estimate_job_s()) - spent_s)
        best = max([self._plan.best_tokens_per_s, *(stage.tokens_per_s for stage in self.stages)])
        num_slots, budget = self.limit * self._num_engines, self._plan.budget
        is_cheap = budget.seconds is None and num_slots < _SETTLE_FRACTION * budget.fraction * self._num_remaining
        min_settle_s = _FIRST_SETTLE_S if is_cheap and not best else _MIN_SETTLE_S
        cheap_rows = _CHEAP_FRACTION * budget.fraction * self._num_remaining if budget.seconds is None else 0
        turns = _MORE_TURNS if _MORE_TURNS * num_slots <= cheap_rows else _FIRST_TURNS
        return SteadyMeter(
            int(num_slots * (1 if self.stages else turns)),
            max(min_settle_s, _SETTLE_FRACTION * left_s),
            max(_MIN_MEASURE_S, _MEASURE_FRACTION * left_s),
            best,
        )

    def _make_stage(self) -> Measurement:
        meter = self._meter
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
