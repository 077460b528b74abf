"""Sum the statistics of an engine's lives, and of a rank's engines, so that they read like one engine's."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from dpgen.engine.messages import EngineStats

_INTERVAL_S = 1.0


class LifeStats:
    """Add the counts of an engine's earlier lives to those of this one."""

    def __init__(self) -> None:
        self._newest, self._earlier = EngineStats(), EngineStats()

    def add(self, stats: EngineStats) -> EngineStats:
        """Take this life's newest statistics, and return them with the counts of all lives."""
        self._newest = stats
        return stats.add_counts(self._earlier)

    def end_life(self) -> None:
        """Count from 0 again, on top of what was counted."""
        self._newest, self._earlier = EngineStats(), self._newest.add_counts(self._earlier)

    def drop_generated(self, num_tokens: int) -> None:
        """Leave out tokens that are no part of the result."""
        num_left = self._earlier.num_generated_tokens - num_tokens
        self._earlier = dataclasses.replace(self._earlier, num_generated_tokens=num_left)


class StatsSum:
    """Keep the newest statistics of each engine, and return their sum about once a second."""

    def __init__(self) -> None:
        self._newest: dict[int, EngineStats] = {}
        self._reported: set[int] = set()  # engines that have sent some since the last sum
        self._last_s = float("-inf")

    def add(
        self, index: int, stats: EngineStats, ready: Collection[int], working: Collection[int], now_s: float
    ) -> EngineStats | None:
        """Take an engine's statistics, and return the sum; None before every engine at work has sent its own.

        Args:
            index: the engine's number.
            ready: the engines that run; what others ran no longer counts as running.
            working: those of them that have rows.
        """
        self._newest[index] = stats
        self._reported.add(index)
        if not self._reported.issuperset(working) and now_s - self._last_s < _INTERVAL_S:
            return None
        self._reported.clear()
        self._last_s = now_s
        return sum_stats([one if i in ready else _drop_running(one) for i, one in self._newest.items()])


def sum_stats(stats: Sequence[EngineStats]) -> EngineStats:
    """Return the sum of several engines' statistics; of the used fraction of the KV cache, the mean."""
    usages = [one.kv_cache_usage for one in stats if one.kv_cache_usage is not None]
    total = stats[0]
    for one in stats[1:]:
        total = dataclasses.replace(
            total.add_counts(one),
            num_running=total.num_running + one.num_running,
            num_waiting=total.num_waiting + one.num_waiting,
        )
    return dataclasses.replace(total, kv_cache_usage=round(sum(usages) / len(usages), 4) if usages else None)


def _drop_running(stats: EngineStats) -> EngineStats:
    return dataclasses.replace(stats, num_running=0, num_waiting=0, kv_cache_usage=None)
