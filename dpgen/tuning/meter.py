"""Measure how fast an engine generates once it is in its stride, from one sample about every second."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

RATE_WINDOW_S = 2.0  # the rate in a sample is of this long
_MIN_RATES = 2
_PRECISION = 0.015  # half the width of the 95 % interval, as a fraction of the rate, that is good enough
_FLAT = 0.02  # change of the rate from one third of the settling time to the next, as a fraction
_LOSER_FRACTION = 0.97  # of the best rate; one that can't reach it is not measured to the end


@dataclass(frozen=True)
class Sample:
    """Hold the totals of all ranks at one time.

    Attributes:
        now_s: on any clock.
        tokens_per_s: generated over the last `RATE_WINDOW_S`; None where not all ranks have one.
        num_rows, num_tokens: finished rows, and generated tokens, since the start of the attempt.
        num_preemptions: since the start of the attempt.
        num_running_seqs, num_running_rows: sequences in the engines now, and the rows that they belong to.
        is_running_out: no rank finds rows to claim any more, so that the engines run empty.
    """

    now_s: float
    tokens_per_s: float | None
    num_rows: int
    num_tokens: int
    num_preemptions: int = 0
    num_running_seqs: int = 0
    num_running_rows: int = 0
    is_running_out: bool = False


@dataclass
class SteadyMeter:
    """Measure one rate: first wait until the engine is settled, then average.

    An engine is settled once it has finished about as many rows as it runs at a time, and its rate falls or rises no
    more: by then the rows in it have all ages, and prompts come at the rate at which rows are finished. So neither the
    ramp-up nor the last rows count.

    Attributes:
        num_settling_rows: rows to finish before the engines count as settled, over all ranks.
        max_settle_s, max_measure_s: the most that either part takes.
        num_surplus_rows: of those to finish, the rows of sequences beyond the number to measure. Before they are
            finished, nothing is measured at all.
        best_tokens_per_s: of the settings measured before; one that is surely slower is not measured to the end.
    """

    num_settling_rows: int
    max_settle_s: float
    max_measure_s: float
    best_tokens_per_s: float = 0.0
    num_surplus_rows: int = 0
    is_settled: bool = False
    is_loser: bool = False
    _first: Sample | None = None
    _start: Sample | None = None
    _last: Sample | None = None
    _rates: list[float] = field(default_factory=list)
    _early_rates: list[float] = field(default_factory=list)  # while it settles

    def add(self, sample: Sample) -> None:
        """Take the next sample."""
        if sample.is_running_out and self._start is not None:
            return
        if self._first is None:
            self._first = sample
        elapsed_s = sample.now_s - self._first.now_s
        if self._start is None:
            if sample.tokens_per_s is not None and elapsed_s >= RATE_WINDOW_S:
                self._early_rates.append(sample.tokens_per_s)
            num_finished = sample.num_rows - self._first.num_rows
            self.is_settled = num_finished >= self.num_settling_rows and self._is_flat
            is_over = elapsed_s >= self.max_settle_s and num_finished >= self.num_surplus_rows
            if elapsed_s >= RATE_WINDOW_S and (self.is_settled or is_over):
                self._start = self._last = sample
            return
        assert self._last is not None
        is_new = sample.num_tokens != self._last.num_tokens or not sample.tokens_per_s  # steps may be longer than 1 s
        self._last = sample
        if sample.tokens_per_s is not None and is_new and sample.now_s - self._start.now_s >= RATE_WINDOW_S - 0.1:
            self._rates.append(sample.tokens_per_s)

    def hurry(self, max_measure_s: float) -> None:
        """Measure now, and no longer than this."""
        self.max_settle_s, self.max_measure_s = 0.0, min(self.max_measure_s, max_measure_s)

    @property
    def _is_flat(self) -> bool:
        """Return True if the last third of the rates so far is about as high as the third before."""
        third = -(-len(self._early_rates) // 3)
        last, before = self._early_rates[-third:], self._early_rates[-2 * third : -third]
        if len(self._early_rates) < 2 or not sum(before):
            return False
        change = sum(last) / len(last) * len(before) / sum(before) - 1
        return abs(change) <= _FLAT * (1 + 1 / third)  # a few rates are noise

    @property
    def is_done(self) -> bool:
        """Return True once the rate is known well enough, or can't be the best."""
        if self._start is None or self._last is None or len(self._rates) < _MIN_RATES:
            return False
        if self.tokens_per_s + self.half_width < _LOSER_FRACTION * self.best_tokens_per_s:
            self.is_loser = True
            return True
        if self._last.now_s - self._start.now_s >= self.max_measure_s:
            return True
        return len(self._rates) > _MIN_RATES and self.half_width <= _PRECISION * self.tokens_per_s

    @property
    def elapsed_s(self) -> float:
        """Return the seconds from the first sample to the last that was measured."""
        return 0.0 if self._first is None or self._last is None else self._last.now_s - self._first.now_s

    @property
    def newest_tokens_per_s(self) -> float:
        """Return the newest rate, whether settled or not; 0 for none."""
        return next(iter([*self._rates[-1:], *self._early_rates[-1:]]), 0.0)

    @property
    def has_rate(self) -> bool:
        return bool(self._rates)

    @property
    def tokens_per_s(self) -> float:
        """Return the mean rate."""
        return sum(self._rates) / len(self._rates)

    @property
    def half_width(self) -> float:
        """Return half the width of the 95 % confidence interval in tokens/s; windows overlap, so half of them count."""
        number, mean = len(self._rates), self.tokens_per_s
        if number < 2:
            return mean
        deviation = math.sqrt(sum((rate - mean) ** 2 for rate in self._rates) / (number - 1))
        return 2 * deviation / math.sqrt(max(1.0, number / RATE_WINDOW_S))

    @property
    def measured_rows(self) -> int:
        """Return the rows finished while the rate was measured."""
        return 0 if self._start is None or self._last is None else self._last.num_rows - self._start.num_rows

    @property
    def measured_tokens(self) -> int:
        """Return the tokens generated while the rate was measured."""
        return 0 if self._start is None or self._last is None else self._last.num_tokens - self._start.num_tokens
