"""Tell when a rank should leave rows to others: when what it holds keeps it busy until the others have done the rest.

- A rank's load is the time until it has finished what it holds, if it claims nothing more. The steps of its longest row
  count, and the costs of all rows.
- A new row would make each step of the long ones slower. So a rank claims rows only as long as its load with them does
  not exceed the end: the time at which the ranks that claim are finished if they share what is unclaimed.
- Rows that run beside a longer one cost no further steps, as long as the batch has room. A rank's slack is the number
  of tokens for which that holds.
- Ranks share loads and slacks with the totals, at most a second old. The rank with the smallest load never yields.

- Expected lengths count only while they come true: once more than a few finished rows have missed theirs, no rank
  yields because of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpgen.scheduling.claims import Claim
from dpgen.scheduling.tail.bound import SortedWork, StepCosts

_TOLERANCE = 0.1  # of the expected length
_MIN_CHECKED = 16
_MAX_WRONG_FRACTION = 0.25
_NUM_SAMPLES = 2048  # positions of the order at which the work of all later rows is kept


@dataclass(frozen=True)
class Load:
    """Describe what one rank holds.

    Attributes:
        time: until it has finished that, in the unit of the costs; -1 for a rank that claims no rows.
        slack: tokens that it can generate meanwhile without further steps.
    """

    time: int
    slack: int = 0


NO_LOAD = Load(-1)


class HeldWork:
    """Keep track of the rows of one rank, by expected length.

    Args:
        find_lengths: returns the expected tokens of the rows of a claim, [num_rows].
        lengths: expected tokens of the rows that ranks claim, [num_rows], in the order in which they are claimed.
        end: the time at which ranks can be finished, as of the plan.
        num_ranks: that claim.

    Attributes:
        num_checked, num_wrong: finished rows, and those whose length was not what was expected.
    """

    def __init__(
        self,
        find_lengths: Callable[[Claim], np.ndarray],
        lengths: np.ndarray,
        costs: StepCosts,
        end: float,
        num_ranks: int,
    ) -> None:
        self._num_ranks = num_ranks
        self._find_lengths, self._costs, self._planned_end = find_lengths, costs, end
        self._rows: dict[int, tuple[float, float]] = {}  # row → (expected tokens, step at which the engine got it)
        self._num_steps = 0.0
        self._tokens = self._cost = self._longest = 0.0  # of all rows held, as if none had begun
        self._remaining = _RemainingWork(lengths, costs)
        self._loads: np.ndarray | None = None  # cumulative, the smallest first: [num_ranks, (time, slack)]
        self._are_lengths_wrong = False
        self.num_checked = self.num_wrong = 0

    def hold(self, claim: Claim, rows: Sequence[int]) -> None:
        """Add the rows of a claim of this rank."""
        for row, length in zip(rows, self._find_lengths(claim).tolist(), strict=True):
            self._rows[row] = (length, math.inf)
            self._tokens += length
            self._cost += self._compute_cost(length)
            self._longest = max(self._longest, length)

    def start(self, row: int) -> None:
        """Note that the engine has the row from now on."""
        if row in self._rows:
            self._rows[row] = (self._rows[row][0], self._num_steps)

    def release(self, row: int, num_tokens: int | None) -> None:
        """Remove a row that is finished.

        Args:
            num_tokens: that were generated; None if the row has failed.
        """
        if row in self._rows:
            length, _ = self._rows.pop(row)
            if num_tokens is not None:
                self.num_checked += 1
                self.num_wrong += abs(num_tokens - length) > _TOLERANCE * length
            self._tokens -= length
            self._cost -= self._compute_cost(length)

    def advance(self, num_steps: float) -> None:
        """Count steps of the engine: tokens that each of its sequences has gained."""
        self._num_steps += num_steps

    def measure(self) -> Load:
        """Return the load, to be shared with all ranks."""
        longest, tokens, cost = self._sum_rows()
        slack = self._costs.max_num_seqs * longest - tokens
        return Load(round(self._compute_time(longest, tokens, cost)), max(0, round(slack)))

    def update(self, loads: Sequence[Load], num_checked: int, num_wrong: int) -> None:
        """Store the loads of all ranks, and the sums of what they have checked, as of a sync of totals."""
        self._are_lengths_wrong = num_checked >= _MIN_CHECKED and num_wrong > _MAX_WRONG_FRACTION * num_checked
        by_time = sorted((load.time, load.slack) for load in loads if load != NO_LOAD)
        self._loads = np.cumsum(by_time, axis=0, dtype=np.float64) if by_time else None

    def count_affordable(self, num_remaining: int) -> int:
        """Return how many more rows this rank should claim: 0 if it should leave them to others.

        Args:
            num_remaining: unclaimed rows over all ranks.
        """
        if not self._rows or num_remaining <= 0 or self._are_lengths_wrong:
            return max(1, num_remaining)
        length, tokens, cost = self._remaining.look_up(num_remaining)
        end = self._find_end(tokens, cost)
        row_cost = max(1e-9, self._compute_cost(length))
        at_most = self._compute_time(max(length, self._longest), self._tokens, self._cost)
        if end - at_most >= num_remaining * row_cost:
            return num_remaining  # far from the end, and cheap to find out
        longest, held_tokens, held_cost = self._sum_rows()
        room = end - self._compute_time(max(longest, length), held_tokens, held_cost)
        if longest <= length:  # no row that is held gets slower beyond the steps that the next row needs on any rank
            room = max(room, cost / self._num_ranks)
        return max(0, int(room / row_cost))

    def _find_end(self, tokens: float, cost: float) -> float:
        """Return the time at which the ranks that claim are finished, if they share the unclaimed rows."""
        if self._loads is None:
            return self._planned_end
        time, slack = self._loads.T
        without_slack = np.maximum(0.0, tokens - slack) * self._costs.step / self._costs.max_num_seqs
        ends = (time + cost + without_slack) / np.arange(1, len(time) + 1)  # if only the first ranks claim
        return float(ends.min())

    def _sum_rows(self) -> tuple[float, float, float]:
        """Return the longest remaining length, all remaining tokens and what they cost beyond the steps."""
        longest = tokens = cost = 0.0
        for length, started_at in self._rows.values():
            done = max(0.0, self._num_steps - started_at)
            if done < length:
                longest = max(longest, length - done)
                tokens += length - done
                cost += self._compute_cost(length) - self._compute_cost(done)
        return longest, tokens, cost

    def _compute_time(self, longest: float, tokens: float, cost: float) -> float:
        return self._costs.step * max(longest, tokens / self._costs.max_num_seqs) + cost

    def _compute_cost(self, length: float) -> float:
        return length * (self._costs.sequence + self._costs.context * length / 2)


class _RemainingWork:
    """Look up how much work the last rows of an order are, and how long the first of them is expected to be."""

    def __init__(self, lengths: np.ndarray, costs: StepCosts) -> None:
        self.full_step = SortedWork(lengths, costs).full_step
        positions = np.unique(np.linspace(0, len(lengths), _NUM_SAMPLES + 1).astype(np.int64))[::-1]
        tokens = np.concatenate([[0.0], np.cumsum(lengths, dtype=np.float64)])
        row_costs = np.concatenate([[0.0], np.cumsum(costs.compute_row_costs(lengths))])
        self._num_rows = len(lengths) - positions
        self._lengths = np.append(lengths, lengths[-1:])[positions]
        self._tokens = tokens[-1] - tokens[positions]
        self._costs = row_costs[-1] - row_costs[positions]

    def look_up(self, num_rows: int) -> tuple[float, float, float]:
        """Return the first of the last rows' length, the tokens of all of them, and their cost beyond the steps."""
        length, tokens, cost = (
            float(np.interp(num_rows, self._num_rows, values)) for values in (self._lengths, self._tokens, self._costs)
        )
        return length, tokens, cost
