"""Compute a time that no schedule can beat, from the rows' lengths and the costs of a step.

A step that generates one token for each of b sequences takes `step + sequence · b`, and `context` more for each token
that they have gained before. So a rank that makes S steps is busy for `step · S` and for the costs of its rows
(`StepCosts.compute_row_costs`), however its rows follow each other. For any schedule on R ranks that ends after W:

- A rank with a row of L tokens makes L steps at least, so that `step · L` of its W goes to steps.
- A rank runs B sequences in a step at most, so each token costs it `step / B` beyond its own cost at least.
- Of two ranks, the one that makes fewer steps has only rows that are not longer than these. So rows that are longer
  than what the (k+1)-th rank can take must fit on the k ranks before it.

The bound is the smallest W that these allow, with rows cut into pieces where that helps. It is at least all work in
full batches over the number of ranks, and at least the longest row alone in an engine. No schedule beats it where steps
cost what they are said to cost; a schedule that reaches it need not exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_PRECISION = 1e-4  # of the bound
_EPSILON = 1e-9


@dataclass(frozen=True)
class StepCosts:
    """Costs of an engine's step, in any unit of time.

    Attributes:
        step: of a step, whatever it runs.
        sequence: more, for each sequence that gains a token in it.
        max_num_seqs: sequences in one step, at most.
        context: more, for each token that these sequences have gained before.
    """

    step: float
    sequence: float
    max_num_seqs: int
    context: float = 0.0

    def compute_row_costs(self, lengths: np.ndarray) -> np.ndarray:
        """Return what the tokens of each row cost beyond the steps, float64[num_rows]."""
        lengths = lengths.astype(np.float64)
        costs: np.ndarray = lengths * (self.sequence + self.context * lengths / 2)
        return costs


class SortedWork:
    """Hold rows, the longest first, to compute bounds for all of them or for those from some position on.

    Args:
        lengths: tokens to generate of each row, [num_rows], the longest first.
        row_costs: what each row costs beyond the steps, float64[num_rows]; `costs.compute_row_costs` by default.
        counts: rows that each of these stands for, float64[num_rows]; one by default.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        costs: StepCosts,
        row_costs: np.ndarray | None = None,
        counts: np.ndarray | None = None,
    ) -> None:
        self._lengths, self._costs = lengths, costs
        by_density: slice | np.ndarray = slice(None, None, -1)  # rows with the most tokens for their costs first
        if row_costs is None:
            row_costs = costs.compute_row_costs(lengths)
        else:
            by_density = np.argsort(row_costs / np.maximum(lengths, 1), kind="stable")
        work = row_costs + lengths * (costs.step / costs.max_num_seqs)  # in full batches
        alone = row_costs + lengths * costs.step  # in an engine without others
        self._longest_alone = np.maximum.accumulate(alone[::-1])[::-1]
        if counts is not None:
            row_costs, work = counts * row_costs, counts * work
        self._row_costs, self._work = _accumulate(row_costs), _accumulate(work)
        self._dense_costs, self._dense_work = _accumulate(row_costs[by_density]), _accumulate(work[by_density])

    def get_longest_alone(self, first: int = 0) -> float:
        """Return the most time that a row from position `first` on takes in an engine without others."""
        return float(self._longest_alone[first])

    @property
    def full_step(self) -> float:
        """Return the mean time of a step with full batches."""
        num_tokens = float(self._lengths.sum(dtype=np.float64))
        return float(self._work[-1]) * self._costs.max_num_seqs / num_tokens if num_tokens else 0.0

    def compute_bound(self, num_ranks: int, first: int = 0) -> float:
        """Return the time that no schedule of the rows from position `first` on can beat; 0 without rows."""
        if first >= len(self._lengths):
            return 0.0
        low = max(float(self._work[-1] - self._work[first]) / num_ranks, self.get_longest_alone(first))
        if self._is_possible(low, num_ranks, first):
            return low
        high = 2 * low
        while not self._is_possible(high, num_ranks, first):
            low, high = high, 2 * high
        while high - low > _PRECISION * high:
            middle = (low + high) / 2
            if self._is_possible(middle, num_ranks, first):
                high = middle
            else:
                low = middle
        return low

    def _is_possible(self, end: float, num_ranks: int, first: int) -> bool:
        """Return whether none of the conditions keeps all ranks from being finished by then."""
        end *= 1 + _EPSILON
        total = (1 - _EPSILON) * float(self._work[-1] - self._work[first])  # sums in another order differ a little
        placed, capacity, free = first, 0.0, 0.0
        for rank in range(num_ranks):
            free += end - self._costs.step * float(self._lengths[placed])  # for the costs of rows, on ranks up to this
            if free < 0:
                return False
            at_most = float(np.interp(free, self._dense_costs, self._dense_work))
            if at_most >= capacity + end:  # steps for its longest row leave this rank, and those after it, full batches
                return capacity + (num_ranks - rank) * end >= total
            capacity = at_most
            if capacity >= total:
                return True
            placed = int(np.searchsorted(self._row_costs, self._row_costs[first] + free, side="right")) - 1
            placed = min(placed, len(self._lengths) - 1)
        return False


def _accumulate(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def compute_bound(
    lengths: np.ndarray,
    costs: StepCosts,
    num_ranks: int,
    row_costs: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> float:
    """Return the time that no schedule of these rows can beat; 0 without rows.

    Args:
        lengths: tokens to generate of each row, [num_rows], in any order.
        row_costs, counts: as for `SortedWork`, in the same order.
    """
    order = np.argsort(-lengths, kind="stable")
    row_costs, counts = (None if values is None else values[order] for values in (row_costs, counts))
    return SortedWork(lengths[order], costs, row_costs, counts).compute_bound(num_ranks)
