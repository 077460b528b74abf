"""Choose the rows that get ranks of their own: so long that a rank that also filled its batches would end last.

Each step of a rank with full batches takes longer than a step of a rank with few sequences. So a row that needs more
steps than full batches make until the end is finished sooner beside few others, while the other ranks take the rest.
Such rows lie at the front of an order by length, in blocks: each is for one rank, whichever comes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpgen.scheduling.tail.bound import SortedWork, StepCosts

# Beside a row that takes as long as the bound by itself, its rank has room for other long rows, so that these keep no
# other rank as long. In simulated runs 1.05 and 1.07 came nearest to the bound.
_ROOM = 1.05


@dataclass(frozen=True)
class HeadPlan:
    """Blocks of rows at the front of an order, each for one rank.

    Attributes:
        ends: position in the order after each block's last row, ascending; empty where no row is that long.
        end: the time at which ranks without a block can be finished, in the unit of the costs.
    """

    ends: tuple[int, ...]
    end: float


def plan_heads(lengths: np.ndarray, costs: StepCosts, num_ranks: int) -> HeadPlan:
    """Return the blocks for these rows.

    Args:
        lengths: expected tokens of each row, [num_rows], the longest first.
    """
    work = SortedWork(lengths, costs)
    full_step = work.full_step
    ends: list[int] = []
    start, end = 0, math.inf
    while start < len(lengths):
        # A single row that takes longer than all else must not make the other blocks as long.
        if len(ends).bit_count() <= 1:  # as it changes less and less, not each time
            bound = work.compute_bound(num_ranks - len(ends), start)
            end = min(end, max(bound, _ROOM * work.get_longest_alone(start)))
        if len(ends) == num_ranks - 1:
            break
        longest = float(lengths[start])
        if full_step * longest <= end:
            break
        row_costs = costs.compute_row_costs(lengths[start : start + costs.max_num_seqs])
        room = end - costs.step * longest
        start += max(1, int(np.searchsorted(np.cumsum(row_costs), room, side="right")))
        ends.append(start)
    return HeadPlan(tuple(ends), end)
