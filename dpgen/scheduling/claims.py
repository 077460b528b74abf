"""Claim positions of shards: one cursor per shard, moved by atomic adds, and stealing from the fullest shard.

- Each position of each shard is claimed exactly once: a cursor only grows, and every add returns a range of its own.
- "Every shard is exhausted" stays true once it is true, so a rank that gets no claim need not ask again.
- Claims shrink towards the end (guided self-scheduling, Polychronopoulos & Kuck, 1987), so that no rank sits on rows
  that another could start.
- A claimer is pure logic over a store with two operations, `add` and `get_many`. The same code runs over the c10d
  store, over a dictionary in a world of one, and in virtual time.

Limit: a claim can't be returned. Positions that a lost rank had claimed come back only with the next plan, which has
new cursors.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpgen.distributed.group import CounterStore

_PROBED_SHARDS = 64  # shards whose cursors are read in one call, to find a full one
_AHEAD_FRACTION = 0.8  # of the shards' mean remaining positions: a rank whose shard holds less is ahead
_AHEAD_POSITIONS = 8  # ... by more than this many: near the end every rank is ahead or behind by chance
_MIN_SLOWDOWN = 1.1  # a smaller slowdown may be chance


@dataclass(frozen=True)
class Claim:
    """Positions start..stop of a shard, which no other rank generates."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class ClaimPolicy:
    """Rules by which a rank claims.

    Attributes:
        steal: claim from other shards once the own shard is exhausted.
        max_size: positions in one claim, at most.
        adaptive: also steal from a shard that is behind while the own shard still holds positions, so that all ranks
            are about equally far in the order, and rows that come last come last everywhere. Also let slow ranks yield
            the end to others. Off where a position is a group of rows that one rank should generate, and where engines
            step in lockstep. Has no effect without `steal`.
    """

    steal: bool
    max_size: int
    adaptive: bool = True


class ShardClaimer:
    """Claim positions for one rank, from its own shard and from others.

    A claim takes half of this rank's fair share of what remains over all ranks.

    Args:
        store: holds the cursors.
        cursors: one key per shard, new ones for each plan. All exist before any rank makes its first claim.
        shard_sizes: positions in each shard.
        rank: index of this rank's own shard, counted over the ranks that claim.
        num_heads: blocks of rows beyond the shards; a rank's first claim is one of them, as long as there are any.

    Attributes:
        num_remaining: unclaimed positions over all shards: as of the last sync of totals, whose result the caller
            writes here, or as this rank has seen since.
        slowdown: the other ranks' mean tokens/s over this rank's, as of the last sync; 1 where unknown. The caller
            writes it here, too.
    """

    def __init__(
        self,
        store: CounterStore,
        cursors: Sequence[str],
        shard_sizes: Sequence[int],
        rank: int,
        policy: ClaimPolicy,
        num_heads: int = 0,
    ) -> None:
        self._store, self._cursors, self._sizes, self._rank = store, cursors, shard_sizes, rank
        self._can_steal, self._max_size = policy.steal, policy.max_size
        self._adaptive = policy.steal and policy.adaptive
        self._own_remaining = shard_sizes[rank]
        self._num_heads, self._has_claimed = num_heads, False
        other_shards = [shard for shard, size in enumerate(shard_sizes) if size and shard != rank]
        self._others = other_shards if policy.steal else []
        random.Random(rank).shuffle(self._others)  # so that ranks probe different shards first
        self.num_remaining = self._last_estimate = sum(shard_sizes)
        self.slowdown = 1.0

    def refresh_own_remaining(self) -> int:
        """Return the unclaimed positions of the own shard; reads the cursor, since other ranks may have stolen."""
        if self._own_remaining and self._can_steal:
            [self._own_remaining] = self._read_remaining([self._rank])
        return self._own_remaining

    @property
    def fair_claim_size(self) -> int:
        """Half of this rank's share of the remaining positions: holding more could leave another rank idle."""
        return self._compute_fair_size(self.num_remaining)

    def should_yield(self, num_in_flight: int) -> bool:
        """Return True if faster ranks would finish the remaining rows before this rank finished a new one.

        While this rank runs one row, each other rank finishes its own `num_in_flight` rows and
        `(slowdown - 1) * num_in_flight` more; yield when fewer than that remain, summed over the other ranks.

        Args:
            num_in_flight: rows that this rank has claimed and not finished, or has when its engine is full. The other
                ranks are assumed to have as many.
        """
        if not self._adaptive or self.slowdown < _MIN_SLOWDOWN:
            return False
        num_others = len(self._sizes) - 1
        return 0 < self.num_remaining < (self.slowdown - 1) * num_in_flight * num_others

    def claim(self, limit: int) -> Claim | None:
        """Claim the next positions for this rank, at most `limit`; return None once every shard is exhausted.

        Without stealing, None means that the own shard is exhausted.
        """
        if not self._has_claimed:
            self._has_claimed = True
            if (head := self._claim_head()) is not None:
                return head
        claim = (self._steal(limit) if self._is_ahead else None) or self._claim_own(limit) or self._steal(limit)
        return claim or self._claim_head()

    def _compute_fair_size(self, num_remaining: int) -> int:
        slowdown = max(1.0, self.slowdown) if self._adaptive else 1.0
        shared = int(num_remaining / (2 * len(self._sizes) * slowdown))
        return min(shared, self._own_remaining // 2) if self._own_remaining else shared

    @property
    def _is_ahead(self) -> bool:
        mean = min(self.num_remaining, self._last_estimate) / len(self._sizes)
        return self._adaptive and self._own_remaining + _AHEAD_POSITIONS < _AHEAD_FRACTION * mean

    def _claim_head(self) -> Claim | None:
        if not self._num_heads:
            return None
        number = self._store.add(f"{self._cursors[0]}/heads", 1) - 1
        if number < self._num_heads:
            return Claim(len(self._sizes), number, number + 1)
        self._num_heads = 0
        return None

    def _claim_own(self, limit: int) -> Claim | None:
        if not self._own_remaining:
            return None
        claim, self._own_remaining = self._claim_from(self._rank, min(limit, self.fair_claim_size))
        return claim

    def _steal(self, limit: int) -> Claim | None:
        """Claim from the fullest probed shard; return None if no other shard holds more than the own one."""
        while self._others:
            probed = self._others[-_PROBED_SHARDS:]
            del self._others[-_PROBED_SHARDS:]
            remaining = dict(zip(probed, self._read_remaining(probed), strict=True))
            estimate = self._estimate_remaining(remaining)
            candidates = [shard for shard in probed if remaining[shard]]
            self._others += candidates  # exhausted shards are never probed again
            if not candidates:
                continue
            fullest = max(candidates, key=remaining.__getitem__)
            if remaining[fullest] <= self._own_remaining:
                return None
            fair_size = self._compute_fair_size(min(self.num_remaining, estimate))
            claim, _ = self._claim_from(fullest, min(limit, fair_size))
            if claim is not None:  # None: other ranks exhausted the shard meanwhile, so probe again
                return claim
        return None

    def _estimate_remaining(self, remaining: Mapping[int, int]) -> int:
        """Return the estimated unclaimed positions over all shards, given those of the shards just probed."""
        # Assumes that the other shards are like the probed ones.
        num_shards = len(remaining) + len(self._others)
        estimate = sum(remaining.values()) * num_shards // len(remaining) + self._own_remaining
        self._last_estimate = estimate
        if not self._others:  # all were probed: the number is exact, and newer than the last sync of totals
            self.num_remaining = min(self.num_remaining, estimate)
        return estimate

    def _claim_from(self, shard: int, wanted: int) -> tuple[Claim | None, int]:
        """Claim about `wanted` positions of a shard; also return how many then remain in the shard."""
        size, wanted = self._sizes[shard], max(1, min(self._max_size, wanted))
        end = self._store.add(self._cursors[shard], wanted)
        start, stop = end - wanted, min(end, size)
        return (Claim(shard, start, stop) if start < size else None), size - stop

    def _read_remaining(self, shards: Sequence[int]) -> list[int]:
        cursors = self._store.get_many([self._cursors[shard] for shard in shards])
        return [max(0, self._sizes[shard] - cursor) for shard, cursor in zip(shards, cursors, strict=True)]
