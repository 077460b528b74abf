"""Measure completion lengths while running: in a group of rows with the same prompt, the first row is the probe.

- Samples of one prompt, written as rows of their own (rollouts, best of n), get similar lengths.
- One row of each prompt group runs first, its probe. Once half of the probes are finished, the remaining rows are
  resharded, longest first by measured length. They are resharded again whenever half of the other groups are measured.
- A probe that is still running is evidence, too: the rest of its group may be longer than all others, so it comes
  first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_NEGLIGIBLE_FRACTION = 1 / 64  # of all groups: as few unmeasured ones are not worth a reshard
_NO_ROWS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class RankState:
    """Rows that one rank has finished or is running in this attempt.

    Attributes:
        finished: row indices, int64[num_finished].
        lengths: generated tokens of each finished row, int64[num_finished]; 0 for a failed row.
        running: rows that the rank has started and will finish, int64[num_running].
        attempts: journal records of rejected attempts at rows that the rank has started and won't finish.
    """

    finished: np.ndarray = field(default_factory=lambda: _NO_ROWS)
    lengths: np.ndarray = field(default_factory=lambda: _NO_ROWS)
    running: np.ndarray = field(default_factory=lambda: _NO_ROWS)
    attempts: tuple[bytes, ...] = ()


class PromptGroups:
    """Group rows that have the same prompt.

    Args:
        group: each row's group, int64[num_dataset_rows], counted from 0; -1 for a row whose prompt no other row has.
    """

    def __init__(self, group: np.ndarray) -> None:
        self._group = group
        self.num_groups = int(group.max(initial=-1)) + 1

    def count(self, state: RankState) -> np.ndarray:
        """Return one rank's finished rows, their tokens and its running rows, by group: int64[3, num_groups].

        The sum over all ranks is the `counts` of the other methods.
        """
        counts = np.zeros((3, self.num_groups), dtype=np.int64)
        finished, running = self._group[state.finished], self._group[state.running]
        is_measured = (finished >= 0) & (state.lengths > 0)
        np.add.at(counts[0], finished[is_measured], 1)
        np.add.at(counts[1], finished[is_measured], state.lengths[is_measured])
        np.add.at(counts[2], running[running >= 0], 1)
        return counts

    def estimate_lengths(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the tokens that each row is expected to generate, float64[num_rows]: the mean of its group.

        inf for a group of which rows run and none is finished; NaN for a group without either, and for a row without a
        group.
        """
        lengths: np.ndarray = _estimate_by_group(counts)[self._group[rows]]
        return lengths

    def make_tracker(self, remaining: np.ndarray, counts: np.ndarray) -> LengthTracker:
        """Return the tracker of the groups that have remaining rows and no finished one."""
        has_rows = np.zeros(self.num_groups + 1, dtype=bool)
        has_rows[self._group[remaining]] = True  # the last entry stands for rows without a group
        return LengthTracker(len(remaining), self._group, has_rows[:-1] & (counts[0] == 0))

    def sort(self, remaining: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the rows in order of work, and the number of probes at their front.

        First come the probes: one of each group that has several remaining rows and none finished or running. Then rows
        of groups that still run their first rows. Then rows that may be as long as any: those without a group, or in
        the group of a probe. Then all others, the longest first.

        Args:
            remaining: rows to sort, int64[num_remaining], ascending.
            counts: `count`, summed over all ranks.
        """
        length_of_group = _estimate_by_group(counts)
        is_unmeasured, group = np.isnan(length_of_group), self._group[remaining]
        unmeasured = np.flatnonzero(is_unmeasured[group] & (group >= 0))
        size = np.bincount(group[unmeasured], minlength=self.num_groups)
        first = np.zeros(self.num_groups, dtype=np.int64)
        first[group[unmeasured[::-1]]] = unmeasured[::-1]  # the last assignment counts, so the first row of each group
        probes = np.sort(first[size > 1])
        is_other = np.ones(len(remaining), dtype=bool)
        is_other[probes] = False
        others = np.flatnonzero(is_other)
        # Sorting the groups, and then numbers that hold the group's place and the row's position, takes a fifth of the
        # time of a stable sort of the rows.
        sort_lengths = np.where(is_unmeasured, np.finfo(np.float64).max, length_of_group)
        place_of_group = np.unique(-sort_lengths, return_inverse=True)[1]
        keys = np.sort(place_of_group[group[others]] * len(remaining) + others)
        others = keys % max(1, len(remaining))
        return remaining[np.concatenate([probes, others])], len(probes)


def _estimate_by_group(counts: np.ndarray) -> np.ndarray:
    """Return each group's length as in `PromptGroups.estimate_lengths`, float64[num_groups + 1]; the last is NaN."""
    finished, tokens, running = counts
    mean = np.where(finished > 0, tokens / np.maximum(1, finished), np.where(running > 0, np.inf, np.nan))
    return np.append(mean, np.nan)  # index -1


class LengthTracker:
    """Count the groups that one rank has measured since a plan, of those without a finished row at that time.

    Args:
        num_rows: planned rows of all ranks.
        group: each row's group, int64[num_dataset_rows].
        is_unmeasured: whether each group is to be measured, bool[num_groups]; modified.

    Attributes:
        num_unmeasured: groups to measure, over all ranks, at the time of the plan; 0 if they are negligibly few.
        num_measured: groups that this rank has measured since, for the ranks to sum.
    """

    def __init__(self, num_rows: int, group: np.ndarray, is_unmeasured: np.ndarray) -> None:
        self.num_rows, self._group, self._is_unmeasured = num_rows, group, is_unmeasured
        num_unmeasured, num_groups = int(is_unmeasured.sum()), len(is_unmeasured)
        self.num_unmeasured = num_unmeasured if num_unmeasured > _NEGLIGIBLE_FRACTION * num_groups else 0
        self.num_measured = 0

    def record_finished(self, row: int) -> None:
        """Count the row's group as measured; later rows of the group change nothing."""
        group = self._group[row]
        if group >= 0 and self._is_unmeasured[group]:
            self._is_unmeasured[group] = False
            self.num_measured += 1


def group_by_prompt(num_rows: int, row_ids: np.ndarray, prompt_hashes: np.ndarray) -> tuple[PromptGroups, int]:
    """Return the prompt groups of some rows, and how many of these rows are in a group.

    Args:
        num_rows: rows of the whole dataset.
        row_ids: indices of the rows to group, int64[n].
        prompt_hashes: a hash of each of their prompts, int64[n]; 0 for a row without a prompt.
    """
    _, prompt, counts = np.unique(prompt_hashes, return_inverse=True, return_counts=True)
    is_grouped = (counts[prompt] > 1) & (prompt_hashes != 0)
    group = np.full(num_rows, -1, dtype=np.int64)
    _, group[row_ids[is_grouped]] = np.unique(prompt[is_grouped], return_inverse=True)
    return PromptGroups(group), int(is_grouped.sum())
