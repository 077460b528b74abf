"""Lengths learnt while running: of rows with the same prompt, the first tells how long the others get.

Samples of one prompt, written as rows of their own (rollouts, best of n), get about as long as each other. So one row
of each prompt goes first, its leader; when half of the leaders are through, what is left is dealt anew, longest first
by what they took, and again whenever half of the others are. A leader that is still running says most by that: its
siblings may be longer than all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_NEGLIGIBLE_FRACTION = 1 / 64  # of the groups, that need not be learnt
_NO_ROWS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class RankState:
    """What one rank has done of the run so far, and does now.

    Attributes:
        finished: rows that it has finished in this attempt, int64.
        lengths: tokens that it generated for each of them, int64; 0 for one that came to nothing.
        running: rows that it has begun and will finish, int64.
    """

    finished: np.ndarray = field(default_factory=lambda: _NO_ROWS)
    lengths: np.ndarray = field(default_factory=lambda: _NO_ROWS)
    running: np.ndarray = field(default_factory=lambda: _NO_ROWS)


class PromptGroups:
    """Which rows have the same prompt.

    Args:
        group: of each row of the dataset, int64, counted from 0; -1 for a row whose prompt no other has.
    """

    def __init__(self, group: np.ndarray) -> None:
        self._group = group
        self.num_groups = int(group.max(initial=-1)) + 1

    def count(self, hand: RankState) -> np.ndarray:
        """What a rank knows of each group: finished rows, their tokens, running rows; int64 of shape (3, groups).

        The ranks' counts are to be summed.
        """
        counts = np.zeros((3, self.num_groups), dtype=np.int64)
        finished, running = self._group[hand.finished], self._group[hand.running]
        known = (finished >= 0) & (hand.lengths > 0)
        np.add.at(counts[0], finished[known], 1)
        np.add.at(counts[1], finished[known], hand.lengths[known])
        np.add.at(counts[2], running[running >= 0], 1)
        return counts

    def estimate_lengths(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Tokens that each of some rows is expected to get: the mean of its siblings; inf where only running ones are
        known, NaN where nothing is. Float64."""
        finished, tokens, running = counts
        of_group = np.where(finished > 0, tokens / np.maximum(1, finished), np.where(running > 0, np.inf, np.nan))
        of_group = np.append(of_group, np.nan)  # of rows without siblings, whose group is -1
        found: np.ndarray = of_group[self._group[rows]]
        return found

    def make_tracker(self, todo: np.ndarray, counts: np.ndarray) -> LengthTracker:
        """What is to be learnt of the groups that rows are left of."""
        has_rows = np.zeros(self.num_groups + 1, dtype=bool)
        has_rows[self._group[todo]] = True  # the last entry is that of rows without siblings
        return LengthTracker(len(todo), self._group, has_rows[:-1] & (counts[0] == 0))

    def sort(self, todo: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, int]:
        """Rows in order of work, and how many leaders there are at its front.

        After the leaders, of groups that nothing is known of, come those whose siblings still run, then rows without
        siblings, which may be as long as any, and then the others, the longest first.

        Args:
            todo: rows to order, int64, ascending.
            counts: as `count` gives them, summed over all ranks.
        """
        expected, group = self.estimate_lengths(todo, counts), self._group[todo]
        unknown = np.flatnonzero(np.isnan(expected) & (group >= 0))
        _, first, size = np.unique(group[unknown], return_index=True, return_counts=True)
        probes = np.sort(unknown[first[size > 1]])
        others = np.setdiff1d(np.arange(len(todo)), probes, assume_unique=True)
        long = np.where(np.isnan(expected[others]), np.finfo(np.float64).max, expected[others])
        others = others[np.argsort(-long, kind="stable")]
        return todo[np.concatenate([probes, others])], len(probes)


class LengthTracker:
    """What one rank still learns of, since a deal: groups of which no row was through then.

    Args:
        num_rows: dealt to all ranks.
        group: of each row of the dataset.
        is_open: of each group, whether it is to be learnt.

    Attributes:
        num_open: groups to learn, of all ranks, at the deal.
        num_learnt: those that this rank has since learnt of; for the ranks to sum.
    """

    def __init__(self, num_rows: int, group: np.ndarray, is_open: np.ndarray) -> None:
        self.num_rows, self._group, self._is_open = num_rows, group, is_open
        self.num_unmeasured = int(is_open.sum()) if is_open.sum() > _NEGLIGIBLE_FRACTION * len(is_open) else 0
        self.num_measured = 0

    def record_finished(self, row: int) -> None:
        """Notes that a row is through."""
        group = self._group[row]
        if group >= 0 and self._is_open[group]:
            self._is_open[group] = False
            self.num_measured += 1


def group_by_prompt(num_rows: int, places: np.ndarray, prompts: np.ndarray) -> tuple[PromptGroups, int]:
    """Rows whose prompts are the same, and how many rows have such siblings.

    Args:
        num_rows: of the whole dataset.
        places: indices of the rows looked at.
        prompts: a number for each of their prompts, the same where they are the same; 0 for none.
    """
    _, found, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    has = (counts[found] > 1) & (prompts != 0)
    group = np.full(num_rows, -1, dtype=np.int64)
    _, group[places[has]] = np.unique(found[has], return_inverse=True)
    return PromptGroups(group), int(has.sum())
