"""Who generates which row: a cursor for every shard, moved by atomic adds, and help for the fullest shard.

Pure logic over a store with two operations, `add` and `get_many`: the same code runs over the c10d store, over a
dictionary in a world of one, and in virtual time. A cursor only ever grows, so each position of each shard is claimed
once, and "every shard is used up" stays true once it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dpgen.distributed.group import CounterStore

_PROBED_SHARDS = 64  # shards whose cursors are read at a time, to find a full one
_AHEAD_FRACTION = 0.8  # of what is left of shards on average: with less in its own, a rank is ahead of the others
_AHEAD_POSITIONS = 8  # and by so many more: at the very end every rank would be ahead or behind by chance
_MIN_SLOWDOWN = 1.1  # times as long as the others; less than that may be chance


@dataclass(frozen=True)
class Claim:
    """Positions start..stop of a shard, which this rank alone will generate."""

    shard: int
    start: int
    stop: int


class ShardClaimer:
    """This rank's claims.

    A claim is a share of what is left over all ranks (guided self-scheduling, Polychronopoulos & Kuck, 1987), so that
    claims shrink towards the end and no rank sits on rows that another could start.

    Args:
        store: holds the cursors.
        cursors: their keys, shard by shard; new ones for each deal. All exist before any rank takes its first claim.
        shard_sizes: the positions in every shard.
        rank: whose claims these are: the number of its own shard.
        steal: whether to help other shards when the own one is used up.
        max_size: the most positions a claim takes.
        evens_out: whether, besides, a shard that is behind is helped although something is left in the own one, so that
            all ranks are about as far in the order of work, and what comes last, be it short rows, comes last
            everywhere; and whether slow ranks leave the end to others. Not where a position is a group of rows that
            one rank had better do, or where engines step together.

    Attributes:
        num_left: positions that nobody has claimed, over all shards: as the ranks last agreed, who write it here, or as
            this rank has seen since.
        slowness: how many times as long as the other ranks this one takes; they agree on that, too.
    """

    def __init__(
        self,
        store: CounterStore,
        cursors: Sequence[str],
        shard_sizes: Sequence[int],
        rank: int,
        *,
        steal: bool,
        max_size: int,
        adaptive: bool = True,
    ) -> None:
        self._store, self._cursors, self._rank = store, cursors, rank
        self._sizes = shard_sizes
        self._can_steal, self._max_size, self._adaptive = steal, max_size, steal and adaptive
        self._own_remaining = shard_sizes[rank]
        self._others = [shard for shard, size in enumerate(shard_sizes) if size and shard != rank] if steal else []
        random.Random(rank).shuffle(self._others)  # so that ranks look at different shards first
        self.num_remaining = self._last_estimate = sum(shard_sizes)
        self.slowdown = 1.0

    def refresh_own_remaining(self) -> int:
        """Positions of the own shard that nobody has claimed, helpers included: they come while this rank is slow."""
        if self._own_remaining and self._can_steal:
            [self._own_remaining] = self._read_remaining([self._rank])
        return self._own_remaining

    @property
    def fair_claim_size(self) -> int:
        """Half of this rank's share of what is left: more than that in one hand could keep another rank idle."""
        return self._fair_size_of(self.num_remaining)

    def _fair_size_of(self, num_remaining: int) -> int:
        slowdown = max(1.0, self.slowdown) if self._adaptive else 1.0
        shared = int(num_remaining / (2 * len(self._sizes) * slowdown))
        return min(shared, self._own_remaining // 2) if self._own_remaining else shared

    def should_yield(self, num_in_flight: int) -> bool:
        """Whether a slow rank should leave what is left to the others.

        A row that it claims now is through after `compute_slowdowns` times as long as one takes elsewhere. In that time the
        others do what they have in hand, and (slowness - 1) times as much of what is left.

        Args:
            num_in_hand: rows that this rank has claimed and not finished, or has when its engine is full; the others
                are taken to have as many.
        """
        if not self._adaptive or self.slowdown < _MIN_SLOWDOWN:
            return False
        num_others = len(self._sizes) - 1
        return 0 < self.num_remaining < (self.slowdown - 1) * num_in_flight * num_others

    def claim(self, limit: int) -> Claim | None:
        """The next positions for this rank, at most so many; None once there are none to be had, ever."""
        return (self._steal(limit) if self._is_ahead else None) or self._claim_own(limit) or self._steal(limit)

    @property
    def _is_ahead(self) -> bool:
        """Whether this rank's shard is used up so far that others, probably, need help."""
        mean = min(self.num_remaining, self._last_estimate) / len(self._sizes)
        return self._adaptive and self._own_remaining + _AHEAD_POSITIONS < _AHEAD_FRACTION * mean

    def _claim_own(self, limit: int) -> Claim | None:
        if not self._own_remaining:
            return None
        claim, self._own_remaining = self._claim_from(self._rank, min(limit, self.fair_claim_size))
        return claim

    def _steal(self, limit: int) -> Claim | None:
        """A claim in the fullest shard; None where nothing is left in the others, or no more than in the own one."""
        while self._others:
            looked_at = self._others[-_PROBED_SHARDS:]
            del self._others[-_PROBED_SHARDS:]
            left = dict(zip(looked_at, self._read_remaining(looked_at), strict=True))
            full = [shard for shard in looked_at if left[shard]]
            # What is left everywhere, if the shards that were not looked at are like these.
            estimate = sum(left.values()) * (len(looked_at) + len(self._others)) // len(looked_at) + self._own_remaining
            self._last_estimate = estimate
            if not self._others:  # then this is no estimate, and newer than what the ranks have agreed on
                self.num_remaining = min(self.num_remaining, estimate)
            self._others += full  # those that are used up are never looked at again
            if not full:
                continue
            fullest = max(full, key=left.__getitem__)
            if left[fullest] <= self._own_remaining:
                return None
            claim, _ = self._claim_from(fullest, min(limit, self._fair_size_of(min(self.num_remaining, estimate))))
            if claim is not None:  # otherwise others emptied it meanwhile: then look again
                return claim
        return None

    def _claim_from(self, shard: int, wanted: int) -> tuple[Claim | None, int]:
        """A claim of about so many positions, and how many are then left in the shard."""
        size, wanted = self._sizes[shard], max(1, min(self._max_size, wanted))
        end = self._store.add(self._cursors[shard], wanted)
        start, stop = end - wanted, min(end, size)
        return (Claim(shard, start, stop) if start < size else None), size - stop

    def _read_remaining(self, shards: Sequence[int]) -> list[int]:
        """How many positions are left in each of these shards."""
        found = self._store.get_many([self._cursors[shard] for shard in shards])
        return [max(0, self._sizes[shard] - seen) for shard, seen in zip(shards, found, strict=True)]
