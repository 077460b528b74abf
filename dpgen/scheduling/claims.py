"""Who generates which row: a cursor for every shard, moved by atomic adds, and help for the fullest shard.

Pure logic over a store with two operations, `add` and `get_many`: the same code runs over the c10d store, over a
dictionary in a world of one, and in virtual time. A cursor only ever grows, so each position of each shard is claimed
once, and "every shard is used up" stays true once it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dpgen.distributed.group import Store

_LOOKED_AT = 64  # shards whose cursors are read at a time, to find a full one
_AHEAD_SHARE = 0.8  # of what is left of shards on average: with less in its own, a rank is ahead of the others
_AHEAD_POSITIONS = 8  # and by so many more: at the very end every rank would be ahead or behind by chance
_SLOW = 1.1  # times as long as the others; less than that may be chance


@dataclass(frozen=True)
class Claim:
    """Positions start..stop of a shard, which this rank alone will generate."""

    shard: int
    start: int
    stop: int


class Claims:
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
        store: Store,
        cursors: Sequence[str],
        shard_sizes: Sequence[int],
        rank: int,
        *,
        steal: bool,
        max_size: int,
        evens_out: bool = True,
    ) -> None:
        self._store, self._cursors, self._rank = store, cursors, rank
        self._sizes = shard_sizes
        self._steal, self._max_size, self._evens_out = steal, max_size, steal and evens_out
        self._left_here = shard_sizes[rank]
        self._others = [shard for shard, size in enumerate(shard_sizes) if size and shard != rank] if steal else []
        random.Random(rank).shuffle(self._others)  # so that ranks look at different shards first
        self.num_left = self._last_estimate = sum(shard_sizes)
        self.slowness = 1.0

    def look_here(self) -> int:
        """Positions of the own shard that nobody has claimed, helpers included: they come while this rank is slow."""
        if self._left_here and self._steal:
            [self._left_here] = self._look([self._rank])
        return self._left_here

    @property
    def fair_size(self) -> int:
        """Half of this rank's share of what is left: more than that in one hand could keep another rank idle."""
        return self._fair_size_of(self.num_left)

    def _fair_size_of(self, num_left: int) -> int:
        slowness = max(1.0, self.slowness) if self._evens_out else 1.0
        shared = int(num_left / (2 * len(self._sizes) * slowness))
        return min(shared, self._left_here // 2) if self._left_here else shared

    def are_for_others(self, num_in_hand: int) -> bool:
        """Whether a slow rank should leave what is left to the others.

        A row that it claims now is through after `slowness` times as long as one takes elsewhere. In that time the
        others do what they have in hand, and (slowness - 1) times as much of what is left.

        Args:
            num_in_hand: rows that this rank has claimed and not finished, or has when its engine is full; the others
                are taken to have as many.
        """
        if not self._evens_out or self.slowness < _SLOW:
            return False
        num_others = len(self._sizes) - 1
        return 0 < self.num_left < (self.slowness - 1) * num_in_hand * num_others

    def take(self, most: int) -> Claim | None:
        """The next positions for this rank, at most so many; None once there are none to be had, ever."""
        return (self._help(most) if self._is_ahead else None) or self._take_own(most) or self._help(most)

    @property
    def _is_ahead(self) -> bool:
        """Whether this rank's shard is used up so far that others, probably, need help."""
        mean = min(self.num_left, self._last_estimate) / len(self._sizes)
        return self._evens_out and self._left_here + _AHEAD_POSITIONS < _AHEAD_SHARE * mean

    def _take_own(self, most: int) -> Claim | None:
        if not self._left_here:
            return None
        claim, self._left_here = self._take_from(self._rank, min(most, self.fair_size))
        return claim

    def _help(self, most: int) -> Claim | None:
        """A claim in the fullest shard; None where nothing is left in the others, or no more than in the own one."""
        while self._others:
            looked_at = self._others[-_LOOKED_AT:]
            del self._others[-_LOOKED_AT:]
            left = dict(zip(looked_at, self._look(looked_at), strict=True))
            full = [shard for shard in looked_at if left[shard]]
            # What is left everywhere, if the shards that were not looked at are like these.
            estimate = sum(left.values()) * (len(looked_at) + len(self._others)) // len(looked_at) + self._left_here
            self._last_estimate = estimate
            if not self._others:  # then this is no estimate, and newer than what the ranks have agreed on
                self.num_left = min(self.num_left, estimate)
            self._others += full  # those that are used up are never looked at again
            if not full:
                continue
            fullest = max(full, key=left.__getitem__)
            if left[fullest] <= self._left_here:
                return None
            claim, _ = self._take_from(fullest, min(most, self._fair_size_of(min(self.num_left, estimate))))
            if claim is not None:  # otherwise others emptied it meanwhile: then look again
                return claim
        return None

    def _take_from(self, shard: int, wanted: int) -> tuple[Claim | None, int]:
        """A claim of about so many positions, and how many are then left in the shard."""
        size, wanted = self._sizes[shard], max(1, min(self._max_size, wanted))
        end = self._store.add(self._cursors[shard], wanted)
        start, stop = end - wanted, min(end, size)
        return (Claim(shard, start, stop) if start < size else None), size - stop

    def _look(self, shards: Sequence[int]) -> list[int]:
        """How many positions are left in each of these shards."""
        found = self._store.get_many([self._cursors[shard] for shard in shards])
        return [max(0, self._sizes[shard] - seen) for shard, seen in zip(shards, found, strict=True)]
