"""How fast each rank goes, and which ones are slow: told by the ranks themselves along with their totals."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

_WINDOW_S = 10.0
_STRAGGLER_FRACTION = 0.7  # of the other ranks' median; below it a rank is called slow
UNKNOWN_RATE = -1


class ThroughputMeter:
    """One rank's generated tokens per second, over the last ten seconds or so."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def record(self, now_s: float, num_generated_tokens: int) -> None:
        """Takes the rank's tokens so far, about once a second while it generates."""
        if self._seen and now_s - self._seen[-1][0] > _WINDOW_S:
            self._seen.clear()  # its engine was started anew, or had nothing to do: that was no pace
        self._seen.append((now_s, num_generated_tokens))
        while len(self._seen) > 2 and now_s - self._seen[1][0] >= _WINDOW_S:
            self._seen.popleft()

    def reset(self) -> None:
        """Forgets all: the rank has no work, and its rate means nothing."""
        self._seen.clear()

    def get_tokens_per_s(self, now_s: float) -> int:
        """Whole tokens/s; `UNKNOWN_RATE` where there is nothing to say: it has not worked for long enough, or not lately."""
        if not self._seen or self._seen[-1][0] - self._seen[0][0] < _WINDOW_S or now_s - self._seen[-1][0] > _WINDOW_S:
            return UNKNOWN_RATE
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return round((last - first) / (last_s - first_s))


def find_straggler(rates: Sequence[int]) -> tuple[int, float] | None:
    """The rank that is well under the others' median, and its share of that; None where none is.

    Args:
        rates: by rank; `UNKNOWN_RATE` for those that are not to be judged.
    """
    working = [rank for rank, rate in enumerate(rates) if rate != UNKNOWN_RATE]
    if len(working) < 2:
        return None
    rank = min(working, key=rates.__getitem__)
    others = median(rates[other] for other in working if other != rank)
    share = rates[rank] / others if others else 1.0
    return (rank, share) if share < _STRAGGLER_FRACTION else None


def compute_slowdowns(rates: Sequence[int]) -> list[float]:
    """How many times as long as the others, on average, each rank takes; 1 for those that are not to be judged.

    Args:
        rates: by rank, as for `find_straggler`.
    """
    working = [rate for rate in rates if rate != UNKNOWN_RATE]
    if len(working) < 2:
        return [1.0] * len(rates)
    total, num_others = sum(working), len(working) - 1
    return [1.0 if rate == UNKNOWN_RATE else (total - rate) / num_others / max(1, rate) for rate in rates]
