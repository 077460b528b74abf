"""Who generates which row: a cursor for every shard, moved by atomic adds, and help for the fullest shard.

Pure logic over a store with two operations, `add` and `get_many`: the same code runs over the c10d store, over a
dictionary in a world of one, and in virtual time. A cursor only ever grows, so each position of each shard is claimed
once, and "every shard is used up" stays true once it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dpgen.collectives import Store

_LOOKED_AT = 64  # shards whose cursors are read at a time, to find a full one


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
        rank: whose claims these are: the number of its own shard, which is claimed first.
        steal: whether to help other shards when the own one is used up.
        max_size: the most positions a claim takes.

    Attributes:
        num_left: positions that nobody has claimed, over all shards: as the ranks last agreed, who write it here.
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
    ) -> None:
        self._store, self._cursors, self._rank = store, cursors, rank
        self._sizes = shard_sizes
        self._steal, self._max_size = steal, max_size
        self._left_here = shard_sizes[rank]
        self._others = [shard for shard, size in enumerate(shard_sizes) if size and shard != rank] if steal else []
        random.Random(rank).shuffle(self._others)  # so that ranks look at different shards first
        self.num_left = sum(shard_sizes)

    @property
    def num_left_here(self) -> int:
        """Positions of the own shard that nobody has claimed, as far as this rank knows."""
        return self._left_here

    @property
    def fair_size(self) -> int:
        """Half of this rank's share of what is left: more than that in one hand could keep another rank idle."""
        shared = self.num_left // (2 * len(self._sizes))
        return min(shared, self._left_here // 2) if self._left_here else shared

    def take(self, most: int) -> Claim | None:
        """The next positions for this rank, at most so many; None once there are none to be had, ever."""
        if self._left_here:
            claim, self._left_here = self._take_from(self._rank, min(most, self.fair_size))
            if claim is not None:
                return claim
        while self._others:
            looked_at = self._others[-_LOOKED_AT:]
            del self._others[-_LOOKED_AT:]
            left = dict(zip(looked_at, self._look(looked_at), strict=True))
            full = [shard for shard in looked_at if left[shard]]
            # What is left everywhere, if the shards that were not looked at are like these.
            estimate = sum(left.values()) * (len(looked_at) + len(self._others)) // len(looked_at)
            self._others += full  # those that are used up are never looked at again
            if not full:
                continue
            fullest = max(full, key=left.__getitem__)
            claim, _ = self._take_from(fullest, min(most, min(self.num_left, estimate) // (2 * len(self._sizes))))
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
